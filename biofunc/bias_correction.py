"""How much of a running mean that began at 0 is made of observations."""

import math

import torch
from torch import Tensor

from biofunc.rule import Hyperparameter


def bias_correction(decay: Hyperparameter, count: Tensor) -> Tensor:
    """`1 - decay^count` for counts of at least 1, precise however near to 1 the decay is.

    In float32 `1 - 0.999` alone is off by 5e-5, and `1 - 0.99999999` is 0. expm1 is precise, and five times as fast as
    a power in float64. A tensor may be differentiated, at a decay of 0 too, where a logarithm has no derivative; in

        1 - decay^count = (1 - decay) + decay (1 - decay^(count - 1))

    the factor hides the derivative that the logarithm does not have. The derivative is off by an ulp of the count at
    most; the second derivative at a decay of exactly 0 is lost, where a count of 2 has -2.

    Args:
        decay: 0-d, in [0, 1).
        count: observations, at least 1, of the floating dtype of the result.

    Returns:
        Shaped like count.
    """
    # Compiled for a CPU, expm1 is exp minus 1, which in float32 is off by 6e-8 / (1 - decay)
    t = count.double() if torch.compiler.is_compiling() and count.is_cpu else count
    if not isinstance(decay, Tensor):
        return (-torch.expm1(t * math.log(decay))).to(count.dtype) if decay else torch.ones_like(count)
    wide = decay.to(torch.promote_types(decay.dtype, t.dtype))
    log = wide.clamp(min=torch.finfo(wide.dtype).tiny).log()
    # Under vmap a 0-d float64 would promote float32 counts
    log, first, rest = [value.to(t.dtype) for value in (log, 1 - wide, wide)]
    return (first - rest * torch.expm1((t - 1) * log)).to(count.dtype)
