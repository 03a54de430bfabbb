"""Gamma and beta numbers, public as `biofunc.random.gamma` and `biofunc.random.beta`.

Gamma draws come from Marsaglia and Tsang's rejection, with X normal and U uniform, for a concentration a >= 1:

    d = a - 1/3
    v = (1 + X / sqrt(9 d))^3
    d v is taken if v > 0 and log U < X^2 / 2 + d (1 - v + log v)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc import parts, philox
from biofunc.draw_arguments import check_number, is_floating, wanted_part
from biofunc.keys import check_key, split
from biofunc.sharding import assembled, local, placed

__all__ = ["beta", "gamma"]


def gamma(
    key: Tensor,
    concentration: float | Tensor,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    like: Tensor | None = None,
) -> Tensor:
    """Draws gamma numbers of rate 1: mean and variance are the concentration.

    Marsaglia and Tsang's rejection in a fixed number of masked rounds, so that it vmaps and compiles. All rounds fail
    for one value with a probability below 1e-9; that value is then the mode of the proposal. It computes in float64
    with the platform's logarithm: draws agree between eager code, compiled code and devices to the rounding of `dtype`,
    except where a proposal sits on the edge of acceptance.

    Args:
        key: int64 `(2,)`.
        concentration: > 0, a number or a tensor that broadcasts with the draw.
        shape: shape of the draw; default: the shape of the concentration.
        dtype: any floating dtype.
        like: as for `uniform`.

    Returns:
        `shape` of `dtype`.

    Raises:
        TypeError: `key` is not a key, `shape` is not a shape, `dtype` is not floating, or `like` is a DTensor inside
            `grad` or `vmap` of torch.func.
        ValueError: the concentration is a number that is not positive, or a tensor of another shape; `like` has another
            shape than `shape`; or `key` holds several.

    Source: Marsaglia, Tsang 2000, doi 10.1145/358407.358414.
    """
    return _placed_like(_log_gamma(key, "concentration", concentration, shape, dtype, like).exp().to(dtype), like)


def beta(
    key: Tensor,
    a: float | Tensor,
    b: float | Tensor,
    shape: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    like: Tensor | None = None,
) -> Tensor:
    """Draws beta numbers in [0, 1] as X / (X + Y) of gamma numbers X and Y.

    Args:
        key: int64 `(2,)`.
        a: concentration of X, > 0, a number or a tensor that broadcasts with the draw.
        b: concentration of Y, likewise.
        shape: shape of the draw; default: the broadcast shape of `a` and `b`.
        dtype: any floating dtype.
        like: as for `uniform`.

    Returns:
        `shape` of `dtype`.

    Raises:
        TypeError: `key` is not a key, `shape` is not a shape, `dtype` is not floating, or `like` is a DTensor inside
            `grad` or `vmap` of torch.func.
        ValueError: a concentration is a number that is not positive, or a tensor of another shape; `like` has another
            shape than `shape`; or `key` holds several.
    """
    for name, concentration in (("a", a), ("b", b)):
        _check_concentration(name, concentration)
    if shape is None and like is None:
        shape = (torch.as_tensor(a) + torch.as_tensor(b)).shape
    left, right = split(key)
    difference = _log_gamma(left, "a", a, shape, dtype, like) - _log_gamma(right, "b", b, shape, dtype, like)
    return _placed_like(difference.sigmoid().to(dtype), like)


_GAMMA_ROUNDS = 7  # a round accepts with probability above 0.951 at any concentration: 0.049^7 < 1e-9


def _placed_like(draw: Tensor, like: Tensor | None) -> Tensor:
    return draw if like is None else assembled(draw, like)


def _log_gamma(
    key: Tensor,
    name: str,
    concentration: float | Tensor,
    shape: Sequence[int] | None,
    dtype: torch.dtype,
    like: Tensor | None,
) -> Tensor:
    """Logarithm of a gamma draw, float64: small concentrations give draws that would underflow. Of a part, if any."""
    check_key(key)
    if key.dim() != 1:
        raise ValueError(f"key has shape {tuple(key.shape)}; gamma and beta take one key: use torch.vmap for several")
    if not is_floating(dtype):
        raise TypeError(f"dtype is {dtype!r}; gamma and beta draw floating dtypes, torch.float32")
    _check_concentration(name, concentration)
    if not isinstance(concentration, Tensor):
        concentration = torch.full((), concentration, device=key.device, dtype=torch.float64)
    alpha = concentration.to(key.device, torch.float64)
    if shape is None:
        shape = alpha.shape if like is None else ()
    part, shape = wanted_part(key, shape, like)
    if like is not None and part is not None and alpha.dim():
        alpha = local(placed(alpha, like))
    if len(alpha.shape) > len(shape) or any(
        [size not in (1, wanted) for size, wanted in zip(alpha.shape[::-1], tuple(shape)[::-1], strict=False)]
    ):
        raise ValueError(f"{name} has shape {tuple(alpha.shape)}, which does not broadcast to shape {tuple(shape)}")
    count = math.prod(shape)
    # Below 1: gamma(alpha) = gamma(alpha + 1) U^(1 / alpha)
    d = torch.where(alpha < 1, alpha + 1, alpha) - 1 / 3
    keys = split(key, _GAMMA_ROUNDS + 1)
    log_draw, accepted = d.log().expand(shape), torch.zeros(shape, dtype=torch.bool, device=key.device)
    for round_ in range(_GAMMA_ROUNDS):
        if part is None or like is None:
            both = philox.words(keys[round_], 2 * count)
            first, second = both[:count], both[count:]
        else:
            first, second = parts.words(keys[round_], part), parts.words(keys[round_], part.shifted(like.numel()))
        x = philox.to_normal(first).to(torch.float64).reshape(shape)
        log_u = _open_uniform(second).log().reshape(shape)
        v = (1 + x / (9 * d).sqrt()) ** 3
        log_v = v.clamp(min=torch.finfo(torch.float64).tiny).log()
        accept = (v > 0) & (log_u < x * x / 2 + d * (1 - v + log_v))
        log_draw = torch.where(accept & ~accepted, d.log() + log_v, log_draw)
        accepted = accepted | accept
    last = philox.words(keys[-1], count) if part is None else parts.words(keys[-1], part)
    boost = _open_uniform(last).log().reshape(shape) / alpha
    return torch.where(alpha < 1, log_draw + boost, log_draw)


def _open_uniform(words: Tensor) -> Tensor:
    """float64 uniforms of (0, 1), 32 bits: the middle of each of 2^32 intervals."""
    return (words.to(torch.float64) + 0.5) / 2**32


def _check_concentration(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}; a concentration is positive")
