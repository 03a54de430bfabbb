"""What does a step of one member cost in an ensemble of small networks?

Perceptrons 64-128-10, batch 64, volume-dependent and fuzzy rates and crystallisation under SGD: one compiled,
vmapped step against pytorch_bio_transformations, whose members learn one after another. Seconds per member and step;
with `random.accelerate()` unless it says "tensor operations".
"""

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from harness import Row, main, models, race
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

import biofunc as bf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bio_transformations.bio_converter import BioConverter

RULES = (bf.crystallize, bf.sgd(), bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1))


def make() -> torch.nn.Module:
    return models.mlp(64, (128,), 10)


def stepped(members: int, x: torch.Tensor, y: torch.Tensor) -> Any:
    """A function that makes one step of the whole ensemble."""
    model, learn = make(), bf.chain(*RULES)

    def step(params: Any, state: Any) -> Any:
        grads = grad(lambda p: cross_entropy(functional_call(model, p, (x,)), y))(params)
        params, _, state = learn(params, grads, state)
        return params, state

    params, _ = bf.ensemble.init(make, range(members))
    params = {path: p.to(x.device) for path, p in params.items()}
    now = [params, torch.vmap(learn.init)(params, bf.random.key(torch.arange(members, device=x.device)))]
    compiled = torch.compile(torch.vmap(step), fullgraph=True)

    def run() -> None:
        now[:] = compiled(*now)

    return run


def measure(threads: int | None, options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    torch.manual_seed(0)
    x, y = torch.rand(64, 64, device=device), torch.randint(10, (64,), device=device)
    original: list[Any] = [BioConverter()(make()).to(device) for _ in range(8)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in original]

    def theirs() -> None:
        for model, optimizer in zip(original, optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            model.volume_dependent_lr()
            model.fuzzy_learning_rates()
            model.crystallize()
            optimizer.step()

    bound = ">= 10" if threads == 2 else ">= 6"
    cases = [(8, True, ">= 1"), (32, True, ">= 1"), (128, True, bound), (128, False, bound), (512, True, ">= 1")]
    if device.type == "cuda":
        cases = [(1024, False, ">= 200"), (8192, False, ">= 200")]
    for members, accelerated, target in cases:
        bf.random.accelerate(accelerated)
        torch.compiler.reset()  # else the cases count as recompilations of one step
        ours = stepped(members, x, y)
        name = f"{members} members" + ("" if accelerated or device.type == "cuda" else ", tensor operations")
        yield race(name, ours, "0.0.5", theirs, target, threads=threads, per=(members, 8))


if __name__ == "__main__":
    main(__doc__ or "", measure)
