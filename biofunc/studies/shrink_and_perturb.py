"""Shrink and perturb: all parameters shrink a little, and noise like that of a fresh network is added.

The rival from machine learning against which rejuvenation is measured: it renews every parameter in part, where
rejuvenation renews a few in full.

    w <- (1 - shrink) w + perturb z,    z a fresh initial value: mean 0, the standard deviation that the leaf began with
"""

import math

from torch import Tensor

from biofunc.decorator import GIVEN, rule
from biofunc.noise import Noise
from biofunc.reductions import finite_mean
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["shrink_and_perturb"]


def _remember_spread(params: Leaves, state: BioState, *, name: str) -> BioState:
    def spread(w: Tensor) -> Tensor:  # the step is 0 here, and batched where any input of init is
        return finite_mean((w - finite_mean(w)) ** 2).sqrt() + state.step.to(w.device, w.dtype)

    return state.with_slot(name, spread={path: spread(w) for path, w in params.items()})


@rule(
    phase="weights",
    ranges={"shrink": "[0, 1]", "perturb": "[0, inf)"},
    choices={"distribution": ("uniform", "normal")},
    init=_remember_spread,
    every_leaf=True,
)
def shrink_and_perturb(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    shrink: Hyperparameter = 0.6,
    perturb: Hyperparameter = 0.1,
    distribution: str = "uniform",
    noise: Noise = GIVEN,
    name: str = GIVEN,
) -> tuple[Leaves, Leaves, BioState]:
    """Shrinks every parameter and adds a share of a fresh initial value: `w <- (1 - shrink) w + perturb z`.

    Args:
        params: tree of parameters.
        grads: tree like params; not used.
        state: made with this rule; it keeps the standard deviation with which each leaf began.
        shrink: share of a parameter that is lost per call, in [0, 1].
        perturb: share of a fresh initial value that is added per call, >= 0. shrink = perturb = 0 turns the rule off.
        distribution: of the fresh values z, "uniform" as PyTorch initialises, or "normal".

    Returns:
        The new params, grads and state as given.

    Raises:
        ValueError, TypeError: a number out of its range, or an unknown distribution.
        KeyError: the state was made without this rule.

    Phase: weights.

    Noise: one uniform or normal per parameter.

    Source: Ash, Adams 2020, arXiv 1910.08475; their code shrinks to 0.4 and perturbs by 0.1 when new data arrive.

    Differs: z has the standard deviation of the leaf's own initial values, whatever the initialisation was, and mean 0;
    the state of a parameter (moments, counts, rates) does not restart.
    """
    (draw,) = noise.draw(params, distribution)
    spread = state.slots[name]["spread"]

    def fresh(path: str) -> Tensor:
        standard = draw[path] if distribution == "normal" else math.sqrt(3) * (2 * draw[path] - 1)
        return spread[path] * standard

    return {path: (1 - shrink) * w + perturb * fresh(path) for path, w in params.items()}, grads, state
