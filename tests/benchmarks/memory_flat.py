"""Does the memory of a process stay flat while an ensemble trains for a long time?

1000 perceptrons 8-8-4 in chunks of 250, one compiled step with rejuvenation every hundredth time, 20,000 steps. The
resident memory of the process must not grow from step 1000 to the last by more than 2 %.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import torch
from harness import models
from memory import status
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import biofunc as bf

TARGET = 0.02


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes that the process held after so many steps."""

    steps: int
    bytes: int


def make() -> torch.nn.Module:
    return models.mlp(8, (8,), 4)


def train(members: int, size: int, steps: int, marks: int, backend: str) -> list[Resident]:
    """Trains an ensemble chunk by chunk within each step, and looks at memory so many times at equal distances."""
    torch.set_num_threads(1)
    learn = bf.chain(
        bf.crystallize,
        bf.adam(),
        bf.fuzzy_learning_rates,
        bf.descend(1e-3),
        bf.every(100, bf.rejuvenate_weights),
    )
    model = make()

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        grads = grad(lambda p: cross_entropy(functional_call(model, p, (x,)), y))(params)
        params, _, state = learn(params, grads, state)
        return params, state

    params, _ = bf.ensemble.init(make, range(members))
    state = torch.vmap(learn.init)(params, bf.random.key(torch.arange(members)))
    chunks = bf.ensemble.split((params, state), size)
    del params, state
    ensemble_step = torch.compile(torch.vmap(step, in_dims=(0, 0, None, None)), fullgraph=True, backend=backend)
    found = []
    for number in tqdm(range(1, steps + 1), desc="steps", leave=False):
        key = bf.random.key(number)
        x, y = bf.random.normal(key, (16, 8)), torch.arange(16) % 4
        for i, chunk in enumerate(chunks):
            chunks[i] = ensemble_step(*chunk, x, y)
        if number % (steps // marks) == 0:
            found.append(Resident(number, status("VmRSS")))
    whole, state = bf.ensemble.join(chunks, members)
    assert all([leaf.isfinite().all() for leaf in whole.values()])
    assert state.step.tolist() == [steps] * members
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20_000, help="a multiple of 20 (default: 20000)")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--quick", action="store_true", help="100 members, 400 steps, nothing compiled by inductor")
    options = parser.parse_args()
    bf.random.accelerate()
    if options.quick:
        found = train(100, 25, 400, 20, "aot_eager")
    else:
        found = train(options.members, options.chunk, options.steps, 20, "inductor")
    first, last = found[0], found[-1]
    growth = last.bytes / first.bytes - 1
    print(f"{__doc__}\ntorch {torch.__version__}, 1 thread\n")
    print("| steps | resident memory |")
    print("|---|---|")
    for mark in found:
        if mark in (first, last) or mark.steps % (last.steps // 4) == 0:
            print(f"| {mark.steps} | {mark.bytes / 1e6:.1f} MB |")
    missed = "" if growth <= TARGET else " **missed**"
    print(f"\nFrom step {first.steps} to step {last.steps}: {growth:+.2%}; must reach <= {TARGET:.0%}{missed}")
    if options.json:
        options.json.write_text(json.dumps({"growth": growth, "marks": [vars(mark) for mark in found]}, indent=1))


if __name__ == "__main__":
    main()
