"""What do the mechanisms cost on the 11.2 million weights of ResNet-18, against pytorch_bio_transformations?

Compiled steps, with `random.accelerate()` on the CPU, against the original's methods in the order of its README, one
update of all 21 synaptic leaves. The original's gradients and rates are set back before every call of either. Its
rejuvenation is our log-normal one; the other is the rule of the paper, at the same place.
"""

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from harness import Row, main, models, race

import biofunc as bf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bio_transformations.bio_converter import BioConverter

THREE = (bf.crystallize, bf.volume_dependent_lr, bf.fuzzy_learning_rates)
RULES = {
    "volume, fuzzy, crystallize": (THREE, ">= 5"),
    "the same and rejuvenation": ((*THREE, bf.descend(0.1), bf.rejuvenate_weights), ">= 6"),
    "with log-normal rejuvenation": ((*THREE, bf.descend(0.1), bf.rejuvenate_weights_lognormal), ">= 6"),
}
METHODS = ("volume_dependent_lr", "fuzzy_learning_rates", "crystallize")


def measure(threads: int | None, options: argparse.Namespace) -> Iterator[Row]:
    device = options.device
    bf.random.accelerate(device.type == "cpu")
    torch.manual_seed(0)
    original: Any = BioConverter()(models.ResNet18()).to(device)
    layers = [layer for layer in original.modules() if hasattr(layer, "bio_mod")]
    slopes = [torch.randn_like(layer.weight) * 0.01 for layer in layers]
    start = [layer.weight.detach().clone() for layer in layers]

    def reset() -> None:
        for layer, slope, weight in zip(layers, slopes, start, strict=True):
            layer.weight.data = weight.clone()
            layer.weight.grad = slope.clone()
            layer.bio_mod.fuzzy_learning_rate_parameters.data.fill_(1.0)

    params = {str(i): weight for i, weight in enumerate(start)}
    grads = {str(i): slope for i, slope in enumerate(slopes)}
    for name, (rules, target) in RULES.items():
        learn = bf.chain(*rules)
        state = learn.init(params, bf.random.key(0))
        torch.compiler.reset()  # else the cases count as recompilations of one step
        step = torch.compile(lambda p, g, s, learn=learn: learn(p, g, s), fullgraph=True)
        methods = [*METHODS, "rejuvenate_weights"] if len(rules) > 3 else METHODS

        def theirs(methods: Any = methods) -> None:
            for method in methods:
                getattr(original, method)()

        ours = lambda step=step, state=state: step(params, grads, state)  # noqa: E731
        bound = ">=" if threads == 1 else target  # stated; two threads are aimed at
        yield race(name, ours, "0.0.5", theirs, bound, threads=threads, before=reset)


if __name__ == "__main__":
    main(__doc__ or "", measure)
