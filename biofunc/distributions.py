"""Distributions of the learning rates that synapses are born with.

Each is a function `(key, weight, nu, path) -> rates`, shaped like the weight, with mean 1: a synapse may be fast or
slow, the layer as a whole learns as before. `nu` is the spread: the half-width of the bounded distributions, the
standard deviation of the others. A distribution of one's own has the same signature; if it draws with `like=weight`, it
serves sharded weights too. `fuzzy_learning_rates` clamps what they give, which lifts or lowers the mean of a wide
distribution.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc import random
from biofunc.reductions import finite_mean

__all__ = ["baseline", "beta", "gamma", "layer_adaptive", "lognormal", "normal", "uniform", "weight_adaptive"]

Distribution = Callable[[Tensor, Tensor, Any, str], Tensor]

_SMALLEST_NU = 1e-4  # concentrations 1 / nu and 1 / nu^2 stay finite


def baseline(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """All rates 1: the control.

    Args:
        key: int64 `(2,)`; not used.
        weight: the weights of the leaf.
        nu: not used.
        path: path of the leaf; not used.

    Returns:
        Ones, shaped like the weight.
    """
    return torch.ones_like(weight)


def uniform(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """Rates U(1 - nu, 1 + nu): mean 1, standard deviation nu / sqrt(3).

    Args:
        key: int64 `(2,)`.
        weight: the weights of the leaf.
        nu: half-width, in [0, 1).
        path: path of the leaf; not used.

    Returns:
        Rates, shaped like the weight.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `key` holds several keys and the weight is a DTensor.
    """
    return 1 + nu * (2 * random.uniform(key, like=weight).to(weight.dtype) - 1)


def normal(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """Rates N(1, nu^2): mean 1, standard deviation nu. Negative rates are possible; the clamp of the rule removes them.

    Args:
        key: int64 `(2,)`.
        weight: the weights of the leaf.
        nu: standard deviation, in [0, 1).
        path: path of the leaf; not used.

    Returns:
        Rates, shaped like the weight.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `key` holds several keys and the weight is a DTensor.
    """
    return 1 + nu * random.normal(key, dtype=weight.dtype, like=weight)


def lognormal(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """Rates exp N(-nu^2 / 2, nu^2): mean 1, standard deviation sqrt(exp(nu^2) - 1), about nu.

    Args:
        key: int64 `(2,)`.
        weight: the weights of the leaf.
        nu: standard deviation of the logarithm, in [0, 1).
        path: path of the leaf; not used.

    Returns:
        Rates, shaped like the weight.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `key` holds several keys and the weight is a DTensor.
    """
    return torch.exp(nu * random.normal(key, dtype=weight.dtype, like=weight) - nu * nu / 2)


def gamma(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """Rates nu^2 Gamma(1 / nu^2): mean 1, standard deviation nu, skewed to fast synapses.

    Args:
        key: int64 `(2,)`.
        weight: the weights of the leaf.
        nu: standard deviation, in [0, 1); below 1e-4 it counts as 1e-4.
        path: path of the leaf; not used.

    Returns:
        Rates, shaped like the weight.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `key` holds several keys and the weight is a DTensor.
    """
    spread = _at_least(nu, weight)
    return spread * spread * random.gamma(key, spread**-2, dtype=weight.dtype, like=weight)


def beta(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """Rates 1 + nu (2 Beta(1 / nu, 1 / nu) - 1): mean 1, within 1 +- nu, standard deviation nu / sqrt(2 / nu + 1).

    Args:
        key: int64 `(2,)`.
        weight: the weights of the leaf.
        nu: half-width, in [0, 1); below 1e-4 it counts as 1e-4.
        path: path of the leaf; not used.

    Returns:
        Rates, shaped like the weight.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `key` holds several keys and the weight is a DTensor.
    """
    spread = _at_least(nu, weight)
    return 1 + spread * (2 * random.beta(key, 1 / spread, 1 / spread, dtype=weight.dtype, like=weight) - 1)


def weight_adaptive(key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
    """Weak synapses differ more: rates U(1 - nu_i, 1 + nu_i), nu_i = nu clip(2 - |w| / mean |w|, 1/2, 3/2). Mean 1.

    Args:
        key: int64 `(2,)`.
        weight: the weights of the leaf.
        nu: half-width at a weight of mean size, in [0, 1).
        path: path of the leaf; not used.

    Returns:
        Rates, shaped like the weight.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `key` holds several keys and the weight is a DTensor.
    """
    size = weight.abs()
    mean = finite_mean(size)
    relative = torch.where(mean > 0, size / torch.where(mean > 0, mean, 1.0), 1.0).nan_to_num(nan=1.0)
    return uniform(key, weight, nu * (2 - relative).clamp(0.5, 1.5), path)


def layer_adaptive(paths: Sequence[str]) -> Distribution:
    """Makes the distribution in which late layers differ less: layer i of L has uniform rates with nu (1 - i / 2L).

    Args:
        paths: paths of the synaptic leaves from the first layer to the last.

    Returns:
        The distribution; mean 1. It raises a KeyError for a leaf that is not among the paths.

    Raises:
        TypeError: paths is a single string.
    """
    if isinstance(paths, str):
        raise TypeError(f"paths is '{paths}'; give the paths of all layers, ['{paths}', …]")
    return _LayerAdaptive({path: index / len(paths) for index, path in enumerate(paths)})


@dataclasses.dataclass(frozen=True, eq=False)
class _LayerAdaptive:
    """Uniform rates that narrow with depth; a class, so that it can be pickled."""

    depth: dict[str, float]

    def __call__(self, key: Tensor, weight: Tensor, nu: float | Tensor, path: str) -> Tensor:
        if path not in self.depth:
            raise KeyError(
                f"layer_adaptive was made without '{path}'; name the leaves from the first layer to the last"
            )
        return uniform(key, weight, nu * (1 - self.depth[path] / 2), path)


NAMED: dict[str, Distribution] = {
    "baseline": baseline,
    "uniform": uniform,
    "normal": normal,
    "lognormal": lognormal,
    "gamma": gamma,
    "beta": beta,
    "weight_adaptive": weight_adaptive,
}


def _at_least(nu: float | Tensor, weight: Tensor) -> Tensor:
    return torch.as_tensor(nu, dtype=torch.float64, device=weight.device).clamp(min=_SMALLEST_NU)
