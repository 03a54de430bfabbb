"""How much of a running mean that began at 0 is made of observations."""

import math

import torch
from torch import Tensor

from biofunc.rule import Hyperparameter


def bias_correction(decay: Hyperparameter, count: Tensor) -> Tensor:
    """`1 - decay^count` for counts of at least 1, precise however near to 1 the decay is.

    In float32 `1 - 0.999` alone is off by 5e-5, and `1 - 0.99999999` is 0. A number goes through expm1, which is also
    five times as fast as a power. A tensor may be differentiated, at a decay of 0 too, where a logarithm has no
    derivative: it takes the power, in float64.
    """
    if isinstance(decay, Tensor):
        return (1 - decay.double() ** count.double()).to(count.dtype)
    return -torch.expm1(count * math.log(decay)) if decay else torch.ones_like(count)
