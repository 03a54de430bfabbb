"""Random numbers that are a pure function of a key.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror, Shaw 2011, doi 10.1145/2063384.2063405), a keyed
bijection of 128-bit counters:

    key = (seed, offset)                       two int64, the bits of two uint64
    block b of key = philox(seed, counter = offset + b)        four 32-bit words
    element j of a draw = word j % 4 of block j // 4

`key`, `split`, `fold_in` with an integer, and `uniform` give the bits of PyTorch's own `torch.func._random`.
The same key gives the same numbers alone, in a loop, under `vmap` whatever the size of the batch, and under
`torch.compile`; computed in integers alone, they should be the same on other devices (not yet run on CUDA). A key is
used once: to draw, or to derive other keys.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc import parts, philox
from biofunc.accelerate import accelerate
from biofunc.keys import check_key, fold_in, key, split
from biofunc.sharding import assembled, check_unwrapped, is_sharded, local, part_of, placed

__all__ = ["accelerate", "bernoulli", "beta", "fold_in", "gamma", "key", "normal", "rademacher", "split", "uniform"]


def uniform(
    key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32, like: Tensor | None = None
) -> Tensor:
    """Draws uniform numbers in [0, 1).

    float32 values are the low 24 bits of a word times 2^-24; float64 values take 53 bits of two words. float16
    has 11 random bits and bfloat16 only 8: draw float32 where that matters.

    Args:
        key: int64 `(..., 2)`; each key starts its own stream.
        shape: shape of the draw of one key.
        dtype: float32, float64, float16 or bfloat16.
        like: a tensor that stands for `shape`; of a DTensor each process draws its own part, so that the draw has its
            placements. For one key.

    Returns:
        `(..., *shape)` of `dtype`.

    Raises:
        TypeError: `key` is not a key, `shape` is not a shape, or `dtype` is not one of the four.
        ValueError: `like` has another shape than `shape`.
    """
    check_key(key)
    part, shape = _wanted(key, shape, like)
    count = math.prod(shape)
    kinds = {torch.float32: "uniform", torch.float16: "uniform of 11 bits", torch.bfloat16: "uniform of 8 bits"}
    if dtype == torch.float64:
        words = philox.words(key, 2 * count) if part is None else parts.words(key, part.doubled())
        high, low = words.reshape((*key.shape[:-1], count, 2)).unbind(-1)
        # ((high << 32) | low) & (2^53 - 1), without shifting into the sign
        draw = (((high & 0x1FFFFF) << 32) | low).to(torch.float64) * 2.0**-53
    elif dtype in kinds:
        draw = _draws(key, count, kinds[dtype], part).to(dtype)
    else:
        raise TypeError(f"dtype is {dtype}; uniform draws float32, float64, float16 or bfloat16")
    return _shaped(draw, key, shape, like)


def normal(
    key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32, like: Tensor | None = None
) -> Tensor:
    """Draws standard normal numbers.

    24 bits of a word select one of 2^24 values by an integer table of the inverse distribution function:
    mean 0, variance 1 + 7e-6, largest magnitude 5.42, largest error of the inverse 1.3e-5. Other dtypes hold the
    same values, rounded.

    Args:
        key: int64 `(..., 2)`; each key starts its own stream.
        shape: shape of the draw of one key.
        dtype: any floating dtype.
        like: as for `uniform`.

    Returns:
        `(..., *shape)` of `dtype`.

    Raises:
        TypeError: `key` is not a key, `shape` is not a shape, or `dtype` is not floating.
        ValueError: `like` has another shape than `shape`.
    """
    check_key(key)
    if not _is_floating(dtype):
        raise TypeError(f"dtype is {dtype!r}; normal draws floating dtypes, torch.float32")
    part, shape = _wanted(key, shape, like)
    return _shaped(_draws(key, math.prod(shape), "normal", part).to(dtype), key, shape, like)


def bernoulli(
    key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None, *, like: Tensor | None = None
) -> Tensor:
    """Draws True with probability `p`: `uniform(key) < p`.

    Args:
        key: int64 `(..., 2)`.
        p: probability in [0, 1], a number or a tensor that broadcasts with the draw.
        shape: shape of the draw of one key; default: the shape of `p`.
        like: as for `uniform`.

    Returns:
        bool `(..., *shape)`.

    Raises:
        TypeError: `key` is not a key, `shape` is not a shape, or `p` no number or tensor.
        ValueError: `p` is a number outside [0, 1].
    """
    if not isinstance(p, Tensor):
        _check_number("p", p)
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; a probability lies in [0, 1]")
    if shape is None:
        shape = p.shape if isinstance(p, Tensor) else ()
    draw: Tensor = uniform(key, shape, like=like) < p
    return draw


def rademacher(
    key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32, like: Tensor | None = None
) -> Tensor:
    """Draws +1 or -1 with equal probability (bit 23 of a word, the sign bit of `normal`).

    Args:
        key: int64 `(..., 2)`.
        shape: shape of the draw of one key.
        dtype: a floating or signed integer dtype.
        like: as for `uniform`.

    Returns:
        `(..., *shape)` of `dtype`.

    Raises:
        TypeError: `key` is not a key, `shape` is not a shape, or `dtype` cannot hold -1.
        ValueError: `like` has another shape than `shape`.
    """
    check_key(key)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_signed):
        raise TypeError(f"dtype is {dtype!r}, which cannot hold -1; give a floating or signed integer dtype")
    part, shape = _wanted(key, shape, like)
    words = philox.words(key, math.prod(shape)) if part is None else parts.words(key, part)
    return _shaped(philox.to_sign(words).to(dtype), key, shape, like)


def _wanted(key: Tensor, shape: Sequence[int], like: Tensor | None) -> tuple[parts.Part | None, Sequence[int]]:
    """The part that is drawn here, if not all is, and its shape."""
    _size("shape", shape)
    if like is None:
        return None, shape
    if tuple(shape) not in ((), tuple(like.shape)):
        raise ValueError(f"shape is {tuple(shape)} and like has shape {tuple(like.shape)}; give one of them")
    if not is_sharded(like):
        check_unwrapped(like)
        return None, like.shape
    if key.dim() != 1:
        raise ValueError(f"key has shape {tuple(key.shape)}, and like is a DTensor; draw with one key")
    part = part_of(like)
    return part, part.shape


def _draws(key: Tensor, count: int, kind: str, part: parts.Part | None) -> Tensor:
    return philox.draws(key, count, kind) if part is None else parts.draws(key, part, kind)


def _shaped(draw: Tensor, key: Tensor, shape: Sequence[int], like: Tensor | None) -> Tensor:
    draw = draw.reshape((*key.shape[:-1], *shape))
    return draw if like is None else assembled(draw, like)


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
        TypeError: `key` is not a key, `shape` is not a shape, or `dtype` is not floating.
        ValueError: the concentration is a number that is not positive, or a tensor of another shape; or `key` holds
            several.

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
        TypeError: `key` is not a key, `shape` is not a shape, or `dtype` is not floating.
        ValueError: a concentration is a number that is not positive, or a tensor of another shape; or `key` holds
            several.
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
    if not _is_floating(dtype):
        raise TypeError(f"dtype is {dtype!r}; gamma and beta draw floating dtypes, torch.float32")
    _check_concentration(name, concentration)
    if not isinstance(concentration, Tensor):
        concentration = torch.full((), concentration, device=key.device, dtype=torch.float64)
    alpha = concentration.to(key.device, torch.float64)
    if shape is None:
        shape = alpha.shape if like is None else ()
    part, shape = _wanted(key, shape, like)
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


def _size(name: str, shape: Any) -> int:
    """How many numbers a shape holds; raises unless it is one."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{name} is {shape!r}; give a tuple of integers, ({shape},)")
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, int | torch.SymInt) or length < 0:
            raise TypeError(f"{name} is {tuple(shape)}; it must hold integers of at least 0")
    return math.prod(shape)


def _is_floating(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a number or a tensor")


def _check_concentration(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        return
    _check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name} is {value}; a concentration is positive")
