"""Penalties on the weights, for the loss."""

import torch
from torch import Tensor

from biofunc import trees
from biofunc.selection import Selection, is_synapse, select_paths
from biofunc.sharding import combined, local
from biofunc.trees import Tree

__all__ = ["l1_penalty"]


def l1_penalty(params: Tree, *, where: Selection = None) -> Tensor:
    """The total weight of the synapses, `sum |w|`: added to a loss, it lets useless synapses shrink to 0.

    Args:
        params: tree of floating-point parameters.
        where: which leaves count, as in `Chain.init`; default: leaves of two or more dimensions.

    Returns:
        0-d tensor, differentiable; its derivative at a weight of 0 is 0. 0 when the tree has no synapse.

    Raises:
        TypeError, ValueError, KeyError: a leaf is not floating point, or `where` selects nothing.

    Source: Tibshirani 1996, doi 10.1111/j.2517-6161.1996.tb02080.x; pytorch_bio_transformations, `l1_reg`.

    Differs: the original sums its learning-rate factors instead of the weights, without a gradient.
    """
    trees.check_given(params)
    flat, _ = trees.flatten(params)
    trees.check_params(flat)
    paths = [p for p, leaf in flat.items() if is_synapse(p, leaf)] if where is None else select_paths(where, flat)
    if not paths:
        return torch.zeros(())
    return torch.stack([combined(local(flat[path]).abs().sum(), flat[path]) for path in paths]).sum()
