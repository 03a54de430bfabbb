"""Fuzzy learning rates: no two synapses learn at the same speed.

The plasticity of biological synapses differs from one to the next. Each synapse is born with a constant factor rho on
its learning rate, drawn once:

    rho ~ U(1 - nu, 1 + nu), clamped to [rate_min, rate_max];    g <- g rho

The factor belongs on the update. In front of Adam a constant factor cancels in m / sqrt(v); in front of plain SGD it
makes no difference which side of the optimizer it stands on.
"""

from typing import Any

from torch import Tensor

from biofunc import distributions
from biofunc.decorator import rule
from biofunc.distributions import Distribution
from biofunc.noise import Noise
from biofunc.sharding import placed
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["fuzzy_learning_rates"]


def _check_distribution(name: str, distribution: Any) -> None:
    if isinstance(distribution, str) and distribution not in distributions.NAMED:
        raise ValueError(
            f"{name}: distribution is '{distribution}'; it must be one of {', '.join(distributions.NAMED)}, "
            "or a function (key, weight, nu, path) -> rates, such as bf.distributions.layer_adaptive(paths)"
        )
    if not isinstance(distribution, str) and not callable(distribution):
        raise TypeError(
            f"{name}: distribution is {distribution!r}; give a name or a function (key, weight, nu, path) -> rates"
        )


def _draw_rates(
    params: Leaves,
    state: BioState,
    *,
    nu: float | Tensor = 0.16,
    distribution: str | Distribution = "uniform",
    rate_min: float | Tensor = 0.5,
    rate_max: float | Tensor = 2.0,
    noise: Noise,
    name: str,
) -> BioState:
    if not isinstance(rate_min, Tensor) and not isinstance(rate_max, Tensor) and rate_min > rate_max:
        raise ValueError(f"{name}: rate_min is {rate_min} and rate_max {rate_max}; rate_min must not exceed rate_max")
    if isinstance(distribution, str):
        distribution = distributions.NAMED[distribution]
    if not callable(distribution):
        raise TypeError(
            f"{name}: distribution is {distribution!r}; give a name or a function (key, weight, nu, path) -> rates"
        )
    if not isinstance(nu, Tensor) and nu == 0:
        return state
    keys = noise.keys(params)
    drawn = {path: distribution(keys[path], w, nu, path) for path, w in params.items()}
    for path, rate in drawn.items():
        if not isinstance(rate, Tensor):
            raise TypeError(f"{name}: distribution gave {type(rate).__name__} for '{path}'; it must give a tensor")
        if rate.shape != params[path].shape:
            raise ValueError(
                f"{name}: distribution gave rates of shape {tuple(rate.shape)} for '{path}'; one per synapse"
            )
    rates = {
        path: placed(rate.clamp(min=rate_min).clamp(max=rate_max), params[path]) for path, rate in drawn.items()
    }
    plasticity = {path: state.plasticity[path] * rate for path, rate in rates.items()}
    return state.replace(plasticity={**state.plasticity, **plasticity}).with_slot(name, innate=rates)


@rule(
    phase="direction",
    ranges={"nu": "[0, 1)", "rate_min": "[0, 1]", "rate_max": "[1, inf]"},
    checks={"distribution": _check_distribution},
    init=_draw_rates,
    applies_rates=True,
)
def fuzzy_learning_rates(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    nu: float | Tensor = 0.16,
    distribution: str | Distribution = "uniform",
    rate_min: float | Tensor = 0.5,
    rate_max: float | Tensor = 2.0,
) -> tuple[Leaves, Leaves, BioState]:
    """Lets every synapse learn at its own rate: `g <- g rho`, with the rates `rho = state.plasticity`.

    All hyperparameters act at init, where the rates are drawn:
    `bf.init(params, key, functools.partial(bf.fuzzy_learning_rates, nu=0.3))`.

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: made with this rule; its `plasticity` is applied.
        nu: spread of the distribution of rates, in [0, 1); 0 draws none and applies the rates of other rules.
        distribution: "baseline", "uniform", "normal", "lognormal", "gamma", "beta", "weight_adaptive", or a function
            `(key, weight, nu, path) -> rates` with mean 1; see `biofunc.distributions`.
        rate_min: smallest rate, in [0, 1]; where it binds it lifts the mean: for the uniform distribution from
            nu = 1 - rate_min on, for the normal one to 1.037 at nu = 0.5.
        rate_max: largest rate, at least 1.

    Returns:
        params and state as given, and the scaled directions.

    Raises:
        ValueError, TypeError: when bound, a number out of its range, an unknown distribution or a schedule; at a step,
            any of the hyperparameters.
        KeyError: the state was made without this rule.

    Phase: direction; behind the optimizer, since Adam cancels constant factors on its gradient.

    Noise: at init, what the distribution draws.

    Source: Hofmann, Becker, Tetzlaff, Mäder 2025, doi 10.1038/s41467-025-60078-9, as in pytorch_bio_transformations.

    Differs: the factor may act on the update; all distributions have mean 1 (the original's gamma has 2, clamped to
    1.84); gamma has standard deviation nu instead of sqrt(nu); adaptive distributions are drawn at init.
    """
    return params, {path: g * state.plasticity[path] for path, g in grads.items()}, state
