"""What does a random number cost?

Eager and compiled, as tensor operations and by the kernel of `random.accelerate()`; eager tensor operations are stated
and have no target. torch.rand and torch.randn take one thread, however many there are.
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
            bound = target if count == 1_000_000 else ""
            for accelerated in (False, True) if device.type == "cpu" else (False,):
                random.accelerate(accelerated)
                case, eager = f"{count:,} {name}s", "<= 2" if accelerated else ""
                suffix = ", accelerated" if accelerated else ""
                yield race(f"{case}, eager{suffix}", ours, rival, theirs, eager, threads=threads)
                torch.compiler.reset()
                compiled = torch.compile(lambda key, draw=draw, count=count: draw(key, (count,)), fullgraph=True)
                step = partial(compiled, key)
                yield race(f"{case}, compiled{suffix}", step, rival, theirs, bound, threads=threads)


if __name__ == "__main__":
    main(__doc__ or "", measure)
