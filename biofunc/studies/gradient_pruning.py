"""Gradient pruning: only the largest entries of a gradient are shared.

g <- g where |g| is above the quantile `share` of its leaf, else 0
"""

import torch
from torch import Tensor

import biofunc as bf
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["gradient_pruning"]


@bf.rule(phase="direction", ranges={"share": "[0, 1)"})
def gradient_pruning(
    params: Leaves, grads: Leaves, state: BioState, *, share: Hyperparameter = 0.9
) -> tuple[Leaves, Leaves, BioState]:
    """Sets the smallest entries of each leaf to 0.

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: any state.
        share: share of the entries of a leaf that become 0, in [0, 1), rounded down; 0: none. Entries that are as
            large as the largest of them become 0 too.

    Returns:
        params and state as given, and the pruned directions.

    Raises:
        ValueError, TypeError: share is out of its range.

    Phase: direction.

    Source: Zhu, Liu, Han 2019, arXiv 1906.08935, section 5; Lin, Han, Mao, Wang, Dally 2018, arXiv 1712.01887.

    Differs: what is pruned is not kept for later steps.
    """

    def prune(g: Tensor) -> Tensor:
        size = g.abs().flatten()
        pruned = torch.as_tensor(share * size.numel(), device=g.device).floor().long()
        threshold = torch.cat([size.new_tensor([-1.0]), size.sort().values]).gather(0, pruned.reshape(1))
        return torch.where(g.abs() > threshold, g, 0.0)

    return params, {path: prune(g) for path, g in grads.items()}, state
