"""What does each mechanism cost in eager mode, against pytorch_bio_transformations?

The 668,672 weights of a perceptron 784-512-512-10. Deterministic mechanisms must not be slower; random ones are timed
against torch.randn of as many numbers, as tensor operations and with `random.accelerate()`. The original's rejuvenation
is our log-normal one.
"""

import argparse
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness import Row, main, models, race

import biofunc as bf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bio_transformations.bio_converter import BioConverter

DETERMINISTIC = {
    "crystallize": bf.crystallize,
    "fuzzy_learning_rates": bf.fuzzy_learning_rates,
    "enforce_dales_principle": bf.enforce_dales_principle,
}
RANDOM = {
    "volume_dependent_lr": (bf.volume_dependent_lr, "volume_dependent_lr"),
    "rejuvenate_weights": (bf.rejuvenate_weights, None),
    "rejuvenate_weights_lognormal": (bf.rejuvenate_weights_lognormal, "rejuvenate_weights"),
}
"""Our rules, and the original's methods of the same formula."""


def measure(threads: int | None, options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    torch.manual_seed(0)
    original: Any = BioConverter(apply_dales_principle=True)(models.mlp(784, (512, 512), 10)).to(device)
    layers = [layer for layer in original.modules() if hasattr(layer, "bio_mod")]
    start = [layer.weight.detach().clone() for layer in layers]
    slopes = [torch.randn_like(weight) * 0.01 for weight in start]

    def reset() -> None:
        for layer, slope, weight in zip(layers, slopes, start, strict=True):
            layer.weight.data = weight.clone()
            layer.weight.grad = slope.clone()
            layer.bio_mod.fuzzy_learning_rate_parameters.data.fill_(1.0)

    params = {str(i): weight for i, weight in enumerate(start)}
    grads = {str(i): slope for i, slope in enumerate(slopes)}
    dale = partial(bf.enforce_dales_principle, axis="postsynaptic")  # the sign of a row, as in the original
    state = bf.init(params, bf.random.key(0), bf.crystallize, bf.fuzzy_learning_rates, dale)
    count = sum(weight.numel() for weight in start)

    for name, rule in DETERMINISTIC.items():
        owners = original.modules() if name == "enforce_dales_principle" else [original]
        methods = [getattr(owner, name) for owner in owners if hasattr(owner, name)]

        def theirs(methods: Any = methods) -> None:
            for method in methods:
                method()

        ours = partial(rule, params, grads, state)
        yield race(name, ours, "0.0.5", theirs, "<= 1", threads=threads, before=reset)
    randn, rival = partial(torch.randn, count, device=device), f"torch.randn({count:,})"
    for name, (rule, method) in RANDOM.items():
        state = bf.init(params, bf.random.key(0), rule)
        ours = partial(rule, params, grads, state)
        yield race(name, ours, rival, randn, "<= 8", threads=threads)
        if device.type != "cpu":
            continue
        bf.random.accelerate()
        case = f"{name}, accelerated"
        yield race(case, ours, rival, randn, "<= 2", threads=threads)
        if method:
            yield race(case, ours, "0.0.5", getattr(original, method), "<= 1", threads=threads, before=reset)
        bf.random.accelerate(False)


if __name__ == "__main__":
    main(__doc__ or "", measure)
