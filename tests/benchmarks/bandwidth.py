"""How close do compiled mechanisms come to the memory's bandwidth?

Mechanisms without noise on one float32 leaf, against `out.copy_(x)` of the same size. Seconds per gigabyte that must
move, the inverse of the bandwidth: each leaf read or written counts once, a copy counts two. volume_dependent_lr is
missing: it draws its noise even where lr_variability is 0.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness import Row, main, race

import biofunc as bf

CASES: dict[str, tuple[Any, int]] = {
    "crystallize": (bf.crystallize, 4),  # reads weight, gradient and rate, writes the rate
    "fuzzy_learning_rates": (bf.fuzzy_learning_rates, 3),  # reads gradient and rate, writes the update
    "enforce_dales_principle": (bf.enforce_dales_principle, 2),  # reads and writes the weight
}


def measure(threads: int | None, options: argparse.Namespace) -> Iterator[Row]:
    device, count = options.device, options.weights
    count = count or (100_000_000 if device.type == "cuda" else 1_000_000 if options.quick else 10_000_000)
    key = bf.random.key(0, device=device)
    w, g = [
        bf.random.normal(key, (max(1, count // 1000), 1000)) * size
        for key, size in zip(bf.random.split(key), (1, 0.01), strict=True)
    ]
    out, gigabytes = torch.empty_like(w), w.numel() * w.element_size() / 1e9
    for name, (rule, leaves) in CASES.items():
        state = bf.init({"w": w}, key, rule)
        torch.compiler.reset()  # else the cases count as recompilations of one step
        step = torch.compile(lambda p, g, s, rule=rule: rule(p, g, s), fullgraph=True)
        yield race(
            f"{name}, {w.numel():,} weights",
            partial(step, {"w": w}, {"w": g}, state),
            "out.copy_(x)",
            partial(out.copy_, w),
            ">= 0.7" if device.type == "cuda" else ">=",
            threads=threads,
            per=(leaves * gigabytes, 2 * gigabytes),
        )


if __name__ == "__main__":
    main(
        __doc__ or "",
        measure,
        lambda parser: parser.add_argument("--weights", type=int, help="default: 100 million on cuda, 10 on the CPU"),
    )
