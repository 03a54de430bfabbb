"""Learning rates that drift: the diversity of synapses fades with time and is renewed.

A synapse keeps a learning rate for a while, not for ever. From call to call the rates relax towards 1, and at every
`renewal_period`-th call they are shaken:

    rho <- 1 + (rho - 1) decay;    rho <- rho + renewal U(-nu, nu)  at every renewal_period-th call

The rule keeps the drifting part apart from what crystallisation has taken off, so that a settled synapse stays settled.
"""

import torch
from torch import Tensor

from biofunc import distributions
from biofunc.decorator import GIVEN, rule
from biofunc.noise import Noise
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["temporal_learning_rates"]


def _birth(params: Leaves, state: BioState, *, nu: float | Tensor = 0.16, noise: Noise, name: str) -> BioState:
    keys = noise.keys(params)
    innate = {path: distributions.uniform(keys[path], w, nu, path) for path, w in params.items()}
    plasticity = {path: state.plasticity[path] * rate for path, rate in innate.items()}
    calls = {path: state.step.to(w.device) + 0 for path, w in params.items()}  # int64: float32 counts to 2^24 only
    state = state.replace(plasticity={**state.plasticity, **plasticity})
    return state.with_slot(name, innate=innate, calls=calls)


@rule(
    phase="direction",
    ranges={
        "nu": "[0, 1)",
        "decay": "[0, 1]",
        "renewal": "[0, 1]",
        "renewal_period": "[1, inf)",
        "rate_min": "(0, 1]",
        "rate_max": "[1, inf]",
    },
    init=_birth,
    writes_rates=True,
)
def temporal_learning_rates(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    nu: float | Tensor = 0.16,
    decay: Hyperparameter = 0.9995,
    renewal: Hyperparameter = 0.1,
    renewal_period: Hyperparameter = 10.0,
    rate_min: Hyperparameter = 0.5,
    rate_max: Hyperparameter = 2.0,
    noise: Noise = GIVEN,
    name: str = "",
) -> tuple[Leaves, Leaves, BioState]:
    """Lets the learning rates of synapses relax towards 1 and renews them now and then.

        rho <- clamp(1 + (rho - 1) decay + [every renewal_period-th call] renewal U(-nu, nu), rate_min, rate_max)

    Stands instead of a distribution of `fuzzy_learning_rates`, which with `nu=0` applies the rates. The original's pace
    is `bf.every(100, bf.temporal_learning_rates)`.

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: made with this rule; its `plasticity` is written.
        nu: half-width of the rates at birth and of the renewal, in [0, 1), fixed at init; 0 turns the rule off.
        decay: what is left of the distance to 1 after a call, in [0, 1]; 1: no relaxation.
        renewal: size of the shaking in units of nu, in [0, 1]; 0: none.
        renewal_period: calls from one renewal to the next, at least 1.
        rate_min: smallest rate, in (0, 1].
        rate_max: largest rate, at least 1.

    Returns:
        params and grads as given, and the state with new rates. Their mean stays 1 where the bounds do not bind.

    Raises:
        ValueError, TypeError: a number out of its range, or nu given at a step.
        KeyError: the state was made without this rule.

    Phase: direction.

    Noise: one uniform per synapse, at init and at every call.

    Source: pytorch_bio_transformations 0.0.5, `update_fuzzy_learning_rates` with the distribution TEMPORAL; it is no
    part of the paper of 2025.

    Differs: the count of calls is part of the state, so that a resumed run goes on; crystallised rates stay so.
    """
    slot = state.slots[name]
    (u,) = noise.draw(params, "uniform")
    innate: Leaves = {}
    calls: Leaves = {}
    period = renewal_period.double() if isinstance(renewal_period, Tensor) else renewal_period
    for path, rate in slot["innate"].items():
        if path not in params:
            continue
        calls[path] = slot["calls"][path] + 1
        shaken = torch.where(calls[path].double() % period == 0, renewal * nu * (2 * u[path] - 1), 0.0)
        innate[path] = (1 + (rate - 1) * decay + shaken).clamp(min=rate_min).clamp(max=rate_max)
    plasticity = {path: state.plasticity[path] * (innate[path] / slot["innate"][path]) for path in innate}
    state = state.replace(plasticity={**state.plasticity, **plasticity})
    return params, grads, state.with_slot(name, innate=innate, calls=calls)
