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
from collections.abc import Sequence

import torch
from torch import Tensor

from biofunc import parts, philox
from biofunc.accelerate import accelerate
from biofunc.draw_arguments import check_number, is_floating, shaped, wanted_part
from biofunc.gamma import beta, gamma
from biofunc.keys import check_key, fold_in, key, split

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
        TypeError: `key` is not a key, `shape` is not a shape, `dtype` is not one of the four, or `like` is a DTensor
            inside `grad` or `vmap` of torch.func.
        ValueError: `like` has another shape than `shape`, or is a DTensor and `key` holds several.
    """
    check_key(key)
    part, shape = wanted_part(key, shape, like)
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
    return shaped(draw, key, shape, like)


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
        TypeError: `key` is not a key, `shape` is not a shape, `dtype` is not floating, or `like` is a DTensor inside
            `grad` or `vmap` of torch.func.
        ValueError: `like` has another shape than `shape`, or is a DTensor and `key` holds several.
    """
    check_key(key)
    if not is_floating(dtype):
        raise TypeError(f"dtype is {dtype!r}; normal draws floating dtypes, torch.float32")
    part, shape = wanted_part(key, shape, like)
    return shaped(_draws(key, math.prod(shape), "normal", part).to(dtype), key, shape, like)


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
        TypeError: `key` is not a key, `shape` is not a shape, `p` is no number or tensor, or `like` is a DTensor inside
            `grad` or `vmap` of torch.func.
        ValueError: `p` is a number outside [0, 1]; `like` has another shape than `shape`, or is a DTensor and `key`
            holds several.
    """
    if not isinstance(p, Tensor):
        check_number("p", p)
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
        TypeError: `key` is not a key, `shape` is not a shape, `dtype` cannot hold -1, or `like` is a DTensor inside
            `grad` or `vmap` of torch.func.
        ValueError: `like` has another shape than `shape`, or is a DTensor and `key` holds several.
    """
    check_key(key)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_signed):
        raise TypeError(f"dtype is {dtype!r}, which cannot hold -1; give a floating or signed integer dtype")
    part, shape = wanted_part(key, shape, like)
    words = philox.words(key, math.prod(shape)) if part is None else parts.words(key, part)
    return shaped(philox.to_sign(words).to(dtype), key, shape, like)


def _draws(key: Tensor, count: int, kind: str, part: parts.Part | None) -> Tensor:
    return philox.draws(key, count, kind) if part is None else parts.draws(key, part, kind)
