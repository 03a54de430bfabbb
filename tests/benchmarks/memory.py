"""How much memory does a training step of an ensemble take at its peak?

Perceptrons 64-128-10, batch 64, as in ensemble.py: 128 and 1024 members, whole and in chunks of 32, with three
mechanisms and without any. The unit is what a step cannot do without: the bytes of params, grads and state together,
once.
"""

import argparse
import concurrent.futures
import ctypes
import dataclasses
import json
import multiprocessing
import pathlib
import re
from collections.abc import Callable
from typing import Any

import torch
from harness import models
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import biofunc as bf

PLAIN = (bf.sgd(), bf.descend(0.1))
MECHANISMS = (bf.crystallize, bf.sgd(), bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1))
TARGET = 2.5


def make() -> torch.nn.Module:
    return models.mlp(64, (128,), 10)


def vmapped(rules: tuple[Any, ...]) -> Callable[..., Any]:
    """A training step of an ensemble, to be compiled."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(64, 64, generator=generator), torch.randint(10, (64,), generator=generator)
    model, learn = make(), bf.chain(*rules)

    def step(params: Any, state: Any) -> Any:
        grads = grad(lambda p: cross_entropy(functional_call(model, p, (x,)), y))(params)
        params, _, state = learn(params, grads, state)
        return params, state

    return torch.vmap(step)


def ensemble(rules: tuple[Any, ...], members: int) -> Any:
    """Parameters and state of an ensemble."""
    params, _ = bf.ensemble.init(make, range(members))
    return params, torch.vmap(bf.chain(*rules).init)(params, bf.random.key(torch.arange(members)))


def stepper(step: Callable[..., Any], chunks: list[Any]) -> Callable[[], None]:
    """A function that makes one step of all chunks; an ensemble that is whole is one chunk."""

    def run() -> None:
        for i, chunk in enumerate(chunks):
            chunks[i] = step(*chunk)

    return run


def size_of(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


@dataclasses.dataclass(frozen=True)
class Peak:
    """Bytes of one ensemble: params, state, and the peak of its steps; the grads are as large as the params."""

    members: int
    chunk: int
    mechanisms: bool
    params: int
    state: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.peak / (2 * self.params + self.state)


def peak(members: int, chunk: int, mechanisms: bool, threads: int, steps: int = 5) -> Peak:
    """Measures one ensemble, in a process that has done nothing else.

    The kernel's own high-water mark sees every allocation, those of a BLAS and of compiled kernels too, which torch's
    profiler does not. The mark is set back after two steps, when the step is compiled, and after free memory has gone
    back to the system, else the steps would fill it without a trace. What is held then, params and state, is added.
    """
    torch.set_num_threads(threads)
    bf.random.accelerate()
    rules = MECHANISMS if mechanisms else PLAIN
    step = torch.compile(vmapped(rules), fullgraph=True, dynamic=False)
    whole = ensemble(rules, members)
    params, state = map(size_of, whole)
    chunks = bf.ensemble.split(whole, chunk)
    del whole
    run = stepper(step, chunks)
    run()
    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for _ in range(steps):
        run()
    return Peak(members, chunk, mechanisms, params, state, status("VmHWM") - before + params + state)


def status(entry: str) -> int:
    found = re.search(rf"{entry}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {entry}; memory is measured on Linux only")
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--members", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    cases = [(m, c, mechanisms) for mechanisms in (True, False) for m in options.members for c in (m, options.chunk)]
    peaks = []
    for case in tqdm(cases, desc="ensembles", leave=False):
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            peaks.append(fresh.submit(peak, *case, options.threads).result())
    print(f"{__doc__}\ntorch {torch.__version__}, {options.threads} threads\n")
    print("| members | in chunks of | mechanisms | params, state | peak | in units | must reach |")
    print("|---|---|---|---|---|---|---|")
    for p in peaks:
        whole, chain = "-" if p.chunk == p.members else str(p.chunk), "three" if p.mechanisms else "none"
        target = f"<= {TARGET}" + ("" if p.ratio <= TARGET else " **missed**")
        sizes = f"{p.params / 1e6:.1f}, {p.state / 1e6:.1f} MB"
        print(f"| {p.members} | {whole} | {chain} | {sizes} | {p.peak / 1e6:.1f} MB | {p.ratio:.2f} | {target} |")
    if options.json:
        options.json.write_text(json.dumps([{**dataclasses.asdict(p), "ratio": p.ratio} for p in peaks], indent=1))


if __name__ == "__main__":
    main()
