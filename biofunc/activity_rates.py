"""Activity-dependent learning rates: the synapses of quiet neurons differ more than those of busy ones.

    n = activity of the neuron / mean over the neurons of its layer;    a = clamp(1 + gain (n - 1), 4/5, 6/5)
    rho ~ U(1 - nu (2 - a), 1 + nu (2 - a)), drawn anew at each call

The rule keeps the drawn part apart from what crystallisation has taken off, so that a settled synapse stays settled.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from biofunc.activity import observed
from biofunc.decorator import GIVEN, REQUIRED, rule
from biofunc.noise import Noise
from biofunc.reductions import finite_mean
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["activity_dependent_rates"]


def _all_alike(params: Leaves, state: BioState, *, name: str) -> BioState:
    # state.step is 0, and batched if anything is: so are the rates
    ones = {path: torch.ones_like(w) + state.step.to(w.device, w.dtype) for path, w in params.items()}
    plasticity = {path: state.plasticity[path] * one for path, one in ones.items()}
    return state.replace(plasticity={**state.plasticity, **plasticity}).with_slot(name, innate=ones)


@rule(
    phase="direction",
    ranges={"nu": "[0, 1)", "gain": "[0, 1]", "rate_min": "(0, 1]", "rate_max": "[1, inf]"},
    init=_all_alike,
    writes_rates=True,
)
def activity_dependent_rates(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    activity: Mapping[str, Tensor] = REQUIRED,
    nu: Hyperparameter = 0.16,
    gain: Hyperparameter = 0.1,
    rate_min: Hyperparameter = 0.5,
    rate_max: Hyperparameter = 2.0,
    noise: Noise = GIVEN,
    name: str = "",
) -> tuple[Leaves, Leaves, BioState]:
    """Draws learning rates that differ more between the synapses of a quiet neuron than between those of a busy one.

        rho ~ U(1 - nu (2 - a), 1 + nu (2 - a)),    a = clamp(1 + gain (activity / mean activity - 1), 4/5, 6/5)

    `fuzzy_learning_rates` with `nu=0` applies the rates. The original draws at a tenth of the steps, by chance:
    `bf.every(10, bf.activity_dependent_rates)` draws at every tenth.

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: made with this rule; its `plasticity` is written. All rates are 1 until the first call.
        activity: by path, the mean activity of each postsynaptic neuron `(out,)`, >= 0, as `record_activity` gives it;
            handed over at the step: `learn(params, grads, state, activity=activity)`.
        nu: half-width of the rates of a neuron of mean activity, in [0, 1); 0 turns the rule off.
        gain: how much the width depends on activity, in [0, 1]; 0: not at all.
        rate_min: smallest rate, in (0, 1].
        rate_max: largest rate, at least 1.

    Returns:
        params and grads as given, and the state with new rates, of mean 1 where the bounds do not bind.

    Raises:
        TypeError: no activity was handed over.
        KeyError: activity lacks a leaf that the rule acts on, or the state was made without this rule.
        ValueError: an activity of another length than the layer, or a number out of its range.

    Phase: direction.

    Noise: one uniform per synapse.

    Source: pytorch_bio_transformations 0.0.5, the distribution ACTIVITY; it is no part of the paper of 2025.

    Differs: activity is given, not counted by the forward pass, so that evaluation changes nothing; all neurons are
    drawn at once; crystallised rates stay so.
    """
    (u,) = noise.draw(params, "uniform")
    innate: Leaves = {}
    for path, w in params.items():
        neurons = observed(name, activity, path, w)
        mean = finite_mean(neurons)
        relative = torch.where(mean > 0, neurons / torch.where(mean > 0, mean, 1.0), 1.0).nan_to_num(nan=1.0)
        width = nu * (2 - (1 + gain * (relative - 1)).clamp(0.8, 1.2)).reshape(-1, *[1] * (w.dim() - 1))
        innate[path] = (1 + width * (2 * u[path] - 1)).clamp(min=rate_min).clamp(max=rate_max)
    plasticity = {
        path: state.plasticity[path] * (rate / state.slots[name]["innate"][path]) for path, rate in innate.items()
    }
    state = state.replace(plasticity={**state.plasticity, **plasticity})
    return params, grads, state.with_slot(name, innate=innate)
