"""Statistics of a leaf that one broken synapse cannot spoil: values that are not finite are left out."""

import torch
from torch import Tensor


def finite_mean(values: Tensor) -> Tensor:
    """Mean of the finite values, 0-d; 0 when there is none."""
    finite = torch.isfinite(values)
    return torch.where(finite, values, 0.0).sum() / finite.sum().clamp(min=1)


def finite_max(values: Tensor) -> Tensor:
    """Largest of the finite values, none of which is negative, 0-d; 0 when there is none."""
    if values.numel() == 0:
        return values.sum()
    return torch.where(torch.isfinite(values), values, 0.0).amax()


def finite_min(values: Tensor) -> Tensor:
    """Smallest of the finite values, 0-d; infinity when there is none."""
    if values.numel() == 0:
        return values.sum()
    return torch.where(torch.isfinite(values), values, torch.inf).amin()
