"""Statistics of a leaf that one broken synapse cannot spoil: values that are not finite are left out.

Eager mode takes a pass over memory per operation, and `x.abs() < inf` costs a third of `isfinite`. Broken values are
counted as floats in compiled code: a count in int64 makes a step of crystallisation a fifth slower.
Of a leaf that processes share, each takes the statistic of its part; what comes out is that of the whole leaf.
"""

import torch
from torch import Tensor

from biofunc.sharding import combined, local


def finite_mean(values: Tensor) -> Tensor:
    """Mean of the finite values, 0-d; 0 when there is none. Up to 2^24 values that are not finite count exactly."""
    return finite_means(values)[0]


def finite_means(*leaves: Tensor) -> list[Tensor]:
    """`finite_mean` of leaves that are finite at the same places, which count once: a weight and its size.

    Args:
        leaves: of one shape. Whether they are finite is looked up in the first: where another one is not finite at
            other places, its mean is wrong.

    Returns:
        A 0-d mean for each.
    """
    values, held = leaves[0], [local(leaf) for leaf in leaves]
    finite = held[0].abs() < torch.inf
    if torch.compiler.is_compiling():
        number = finite.numel() - torch.where(finite, 0.0, 1.0).sum(dtype=torch.float32).to(torch.int64)
        sums = [torch.where(finite, part, 0.0).sum() for part in held]
    else:  # the same numbers in less time
        number = finite.sum()
        sums = [part.nan_to_num(0.0, 0.0, 0.0).sum() for part in held]
    if held[0] is not values:
        broken = (finite.numel() - number).to(sums[0].dtype)
        *sums, broken = combined(torch.stack([*sums, broken]), values)
        number = values.numel() - broken.to(torch.int64)
    number = number.clamp(min=1)
    return [total / number for total in sums]


def finite_max(values: Tensor) -> Tensor:
    """Largest of the finite values, none of which is negative, 0-d; 0 when there is none."""
    held = local(values)
    largest = torch.where(held < torch.inf, held, 0.0).amax() if held.numel() else held.sum()
    return combined(largest, values, "max")


def finite_min(values: Tensor) -> Tensor:
    """Smallest of the finite values, 0-d; infinity when there is none."""
    held = local(values)
    if values.numel() and not held.numel():
        return combined(held.sum() + torch.inf, values, "min")
    smallest = torch.where(held.abs() < torch.inf, held, torch.inf).amin() if held.numel() else held.sum()
    return combined(smallest, values, "min")
