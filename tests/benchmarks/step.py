"""What do mechanisms add to a whole training step?

Perceptron 784-512-512-10, batch 64, volume-dependent and fuzzy rates and crystallisation under SGD, compiled, with
`random.accelerate()` on the CPU, against the plain step of a module with torch.optim.SGD.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from harness import Row, main, models, race
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

import biofunc as bf

MECHANISMS = (bf.crystallize, bf.sgd(), bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1))


def measure(threads: int | None, options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    bf.random.accelerate(device.type == "cpu")
    torch.manual_seed(0)
    x, y = torch.rand(64, 784, device=device), torch.randint(10, (64,), device=device)
    model, skeleton = [models.mlp(784, (512, 512), 10).to(device) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def plain() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    for name, rules, target in [
        ("no mechanism", (bf.sgd(), bf.descend(0.1)), "<= 1.5"),
        ("three mechanisms", MECHANISMS, "<= 2"),
    ]:
        learn = bf.chain(*rules)

        def step(params: Any, state: Any, learn: Any = learn) -> Any:
            grads = grad(lambda given: cross_entropy(functional_call(skeleton, given, (x,)), y))(params)
            params, _, state = learn(params, grads, state)
            return params, state

        params = {path: p.detach().clone() for path, p in skeleton.named_parameters()}
        now, compiled = [params, learn.init(params, bf.random.key(0))], torch.compile(step, fullgraph=True)

        def ours(now: Any = now, compiled: Any = compiled) -> None:
            now[:] = compiled(*now)

        yield race(name, ours, "torch.optim.SGD", plain, target, threads=threads)


if __name__ == "__main__":
    main(__doc__ or "", measure)
