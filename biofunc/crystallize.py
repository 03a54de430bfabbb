"""Crystallisation: synapses that have settled, or that are pushed too hard, stop moving.

A spine that has reached its size is stable for months while its neighbours turn over; here a synapse whose relative
gradient is small, or whose gradient exceeds the mean weight of its layer, loses a share of its learning rate:

    settled = |g| / |w| < crystal_thresh   or   |g| > mean |w| of the leaf
    rho <- rho dampening_factor            where settled, not below floor
    rho <- rho + recovery (innate - rho)   elsewhere

The rule only writes the rates `rho = state.plasticity`; `fuzzy_learning_rates` applies them.
"""

import torch
from torch import Tensor

from biofunc.decorator import rule
from biofunc.reductions import finite_mean
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["crystallize"]


def _one_rate_per_synapse(params: Leaves, state: BioState) -> BioState:
    rates = {path: state.plasticity[path] * torch.ones_like(w) for path, w in params.items()}
    return state.replace(plasticity={**state.plasticity, **rates})


@rule(
    phase="gradient",
    ranges={"crystal_thresh": "[0, inf)", "dampening_factor": "(0, 1]", "floor": "[0, 1]", "recovery": "[0, 1]"},
    choices={"freeze_silent": (True, False)},
    init=_one_rate_per_synapse,
    writes_rates=True,
)
def crystallize(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    crystal_thresh: Hyperparameter = 4.5e-5,
    dampening_factor: Hyperparameter = 0.6,
    floor: Hyperparameter = 0.0,
    recovery: Hyperparameter = 0.0,
    freeze_silent: bool = False,
) -> tuple[Leaves, Leaves, BioState]:
    """Lowers the learning rate of synapses that have settled.

        settled = |g| < crystal_thresh |w|  or  |g| > mean |w| of the leaf
        rho <- rho dampening_factor, but no lower than floor, where settled; rho + recovery (innate - rho) elsewhere

    Args:
        params: tree of parameters.
        grads: tree of gradients, like params.
        state: made with this rule; its `plasticity` is written.
        crystal_thresh: relative gradient below which a synapse has settled, >= 0; a gradient per weight.
        dampening_factor: factor on the rate per call, in (0, 1]; 1 turns the rule off (with recovery 0).
        floor: rate below which damping does not go, in [0, 1]; 0: none.
        recovery: share of the way back to the innate rate per call where a synapse has not settled, in [0, 1]; 0: none.
        freeze_silent: whether a synapse without any gradient (a dead unit) counts as settled.

    Returns:
        params and grads as given, and the state with new `plasticity`.

    Raises:
        ValueError, TypeError: a number out of its range.
        KeyError: the state was made without this rule.

    Phase: gradient.

    Source: pytorch_bio_transformations 0.0.5, `crystallize`; it is no part of the paper of 2025.

    Differs: g = 0 does not freeze unless asked, so that dead units can come back; floor and recovery are new; the mean
    leaves out weights that are not finite, so that one NaN does not switch the rule off for its layer; |g| is compared
    with crystal_thresh |w| instead of dividing by w.
    """

    def next_rate(w: Tensor, g: Tensor, rate: Tensor, innate: Tensor | None) -> Tensor:
        size = w.abs()
        push = g.abs()
        settled = (push < crystal_thresh * size) | (push > finite_mean(size))
        if not freeze_silent:
            settled = settled & (push > 0)
        damped, recovered = rate * dampening_factor, rate
        # Where floor or recovery is the number 0, its pass over the leaf is spared; damped is never above rate then
        if isinstance(floor, Tensor) or floor > 0:
            damped = torch.minimum(rate, damped.clamp(min=floor))
        if isinstance(recovery, Tensor) or recovery > 0:
            recovered = rate + recovery * ((1.0 if innate is None else innate) - rate)
        return torch.where(settled, damped, recovered)

    plasticity = {
        path: next_rate(w, grads[path], state.plasticity[path], state.innate(path)) for path, w in params.items()
    }
    return params, grads, state.replace(plasticity={**state.plasticity, **plasticity})
