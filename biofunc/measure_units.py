"""Measures of neurons: which are silent, and how much of what they say differs."""

import torch
from torch import Tensor

from biofunc import trees
from biofunc.measured import check_floating, check_not_negative, computed, joined, selected
from biofunc.reductions import finite_mean
from biofunc.selection import Selection
from biofunc.state import BioState
from biofunc.trees import Tree

__all__ = ["dead_unit_fraction", "effective_rank"]


def dead_unit_fraction(
    activity: Tree,
    *,
    threshold: float | Tensor = 0.0,
    relative: bool = False,
    where: Selection | BioState = None,
) -> Tensor:
    """Share of the neurons that do nothing: those whose mean activity does not exceed a threshold.

        dead = |a_i| <= threshold,    relative: |a_i| <= threshold * mean |a| of the leaf

    Args:
        activity: one value per neuron by path, as `record_activity` gives; over several batches, their mean.
        threshold: >= 0; 0: units that were never active.
        relative: whether the threshold is a share of the mean activity of a unit's layer (dormant units).
        where: which leaves count, to leave the output layer out for one; default: all.

    Returns:
        0-d tensor in [0, 1]; NaN without neurons.

    Raises:
        ValueError, TypeError, KeyError: a negative threshold, a leaf that is not floating point, or `where` selects
            nothing.

    Source: dead units, Dohare et al. 2024, doi 10.1038/s41586-024-07711-7; dormant ones, Sokar et al. 2023,
    arXiv 2302.12902.
    """
    flat, _ = trees.flatten(activity)
    check_floating("activity", flat)
    check_not_negative("threshold", threshold)
    dead, known = [], []
    for path in list(flat) if where is None else selected(flat, where):
        a = computed(flat[path]).abs()
        limit = torch.as_tensor(threshold, dtype=a.dtype, device=a.device) * (finite_mean(a) if relative else 1)
        known.append(torch.isfinite(a))
        dead.append((a <= limit) & known[-1])
    return joined(dead).sum() / joined(known).sum()


def effective_rank(features: Tensor) -> Tensor:
    """Effective rank: in how many directions the features of a layer vary.

        erank = exp(-sum p_i ln p_i),    p = s / sum s,    s = singular values

    Args:
        features: `(samples, units)`, what a layer puts out; any matrix will do, a weight too. Not centred.

    Returns:
        0-d tensor in [1, min(samples, units)]; 0 for a matrix of zeros or without entries, NaN if one is not finite.

    Raises:
        TypeError: features are not a floating-point tensor.
        ValueError: features are not a matrix.

    Source: Roy, Vetterli 2007, The effective rank: a measure of effective dimensionality, EUSIPCO.
    """
    check_floating("features", {"": features})
    if features.dim() != 2:
        raise ValueError(f"features has shape {tuple(features.shape)}; give a matrix (samples, units): flatten(0, -2)")
    x = computed(features)
    if x.numel() == 0:
        return x.sum()
    finite = torch.isfinite(x).all()
    s = torch.linalg.svdvals(torch.where(finite, x, 0.0))  # LAPACK raises on NaN, for all members of an ensemble
    total = s.sum()
    rank = torch.special.entr(s / torch.where(total > 0, total, 1.0)).sum().exp()
    return torch.where(finite, torch.where(total > 0, rank, 0.0), torch.nan)
