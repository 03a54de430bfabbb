"""What does a random number cost?

In eager mode as tensor operations, which is stated and has no target; compiled; and in eager mode with
`random.accelerate()`.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch
from harness import Row, main, race

from biofunc import random

DRAWS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], str]] = {
    "uniform": (random.uniform, torch.rand, "<= 0.5"),
    "normal": (random.normal, torch.randn, "<= 0.75"),
}


def measure(threads: int | None, options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    key = random.key(0, device=device)
    for name, (draw, native, target) in DRAWS.items():
        rival = f"torch.{native.__name__}"
        for count in (10_000, 1_000_000):
            ours, theirs = partial(draw, key, (count,)), partial(native, count, device=device)
            yield race(f"{count:,} {name}s, eager", ours, rival, theirs, "", threads=threads)
            compiled = partial(
                torch.compile(lambda key, ours=ours: ours.func(key, *ours.args[1:]), fullgraph=True), key
            )
            bound = target if count == 1_000_000 else ""
            yield race(f"{count:,} {name}s, compiled", compiled, rival, theirs, bound, threads=threads)
            if device.type == "cpu":
                random.accelerate()
                yield race(f"{count:,} {name}s, accelerated", ours, rival, theirs, "<= 2", threads=threads)
                random.accelerate(False)


if __name__ == "__main__":
    main(__doc__ or "", measure)
