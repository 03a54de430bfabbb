"""Random numbers that are a pure function of a key.

The generator is Philox-4x32-10 (Salmon, Moraes, Dror, Shaw 2011, doi 10.1145/2063384.2063405), a keyed
bijection of 128-bit counters:

    key = (seed, offset)                       two int64, the bits of two uint64
    block b of key = philox(seed, counter = offset + b)        four 32-bit words
    element j of a draw = word j % 4 of block j // 4

`key`, `split`, `fold_in` with an integer, and `uniform` give the bits of PyTorch's own `torch.func._random`.
The same key gives the same numbers alone, in a loop, under `vmap` whatever the size of the batch, under
`torch.compile`, and on every device. A key is used once: to draw, or to derive other keys.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from biofunc import philox

__all__ = ["bernoulli", "fold_in", "key", "normal", "rademacher", "split", "uniform"]

_NAMES = 1  # the counter domain of names, so that they cannot meet integers


def key(seed: int | Tensor, *, device: torch.device | str | None = None) -> Tensor:
    """Makes a key from a seed.

    Args:
        seed: integer in [-2^63, 2^64), or an int64 tensor of them; a tensor of any shape gives that many keys.
        device: where the key lives; default: the seed's own device, or the CPU.

    Returns:
        int64 tensor `(*seed.shape, 2)`: seed and counter offset 0.

    Raises:
        TypeError: the seed is not an integer.
        ValueError: the seed does not fit 64 bits.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed is a tensor of dtype {seed.dtype}; a seed tensor must be int64")
        seed = seed.to(device) if device is not None else seed
        return torch.stack([seed, torch.zeros_like(seed)], -1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r} ({type(seed).__name__}); a seed must be an integer or an int64 tensor")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must lie in [-2^63, 2^64)")
    # Not torch.tensor([seed, 0]): compiled, that would be inlined into each of the generator's rounds
    signed = torch.full((), (seed + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)
    return torch.stack([signed, torch.zeros_like(signed)])


def split(key: Tensor, num: int = 2) -> Tensor:
    """Derives `num` independent keys; key i equals `fold_in(key, i)`.

    Args:
        key: int64 `(..., 2)`.
        num: how many, at least 1.

    Returns:
        int64 `(num, ..., 2)`.

    Raises:
        TypeError: `key` is not a key, or `num` no integer.
        ValueError: `num` is below 1.
    """
    check_key(key)
    if isinstance(num, bool) or not isinstance(num, int):
        raise TypeError(f"num is {num!r}; the number of keys is an integer")
    if num < 1:
        raise ValueError(f"num is {num}; it must be at least 1")
    index = torch.arange(num, device=key.device).view(-1, *[1] * (key.dim() - 1))
    return philox.derive(key.unsqueeze(0), index)


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """Derives one key from a key and a datum; different data give independent keys.

    Args:
        key: int64 `(..., 2)`.
        data: an integer, an integer tensor (0-d, or of a shape that broadcasts with `key.shape[:-1]`), or a
            name. Names are hashed to 64 bits, the same in every process, and live in a counter domain of
            their own: no name meets an integer.

    Returns:
        int64 `(..., 2)`.

    Raises:
        TypeError: `key` is not a key, or `data` is none of the three.
    """
    check_key(key)
    if isinstance(data, str):
        return philox.derive(key, *philox.words_of(hash_name(data)), domain=_NAMES)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"data is a tensor of dtype {data.dtype}; fold_in takes integers, names, integer tensors")
        data = data.to(torch.int64)
        return philox.derive(key, data & philox.WORD, (data >> 32) & philox.WORD)
    if isinstance(data, bool) or not isinstance(data, int):
        raise TypeError(f"data is {data!r} ({type(data).__name__}); fold_in takes integers, names and integer tensors")
    return philox.derive(key, *philox.words_of(data))


def uniform(key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws uniform numbers in [0, 1).

    float32 values are the low 24 bits of a word times 2^-24; float64 values take 53 bits of two words. float16
    has 11 random bits and bfloat16 only 8: draw float32 where that matters.

    Args:
        key: int64 `(..., 2)`; each key starts its own stream.
        shape: shape of the draw of one key.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        `(..., *shape)` of `dtype`.

    Raises:
        TypeError: `key` is not a key, or `dtype` is not one of the four.
    """
    check_key(key)
    count = math.prod(shape)
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(dtype)
    if dtype == torch.float64:
        high, low = philox.words(key, 2 * count).reshape((*key.shape[:-1], count, 2)).unbind(-1)
        # ((high << 32) | low) & (2^53 - 1), without shifting into the sign
        draw = (((high & 0x1FFFFF) << 32) | low).to(torch.float64) * 2.0**-53
    elif bits is not None:
        draw = philox.to_uniform(philox.words(key, count), bits).to(dtype)
    else:
        raise TypeError(f"dtype is {dtype}; uniform draws float32, float64, float16 or bfloat16")
    return draw.reshape((*key.shape[:-1], *shape))


def normal(key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws standard normal numbers.

    24 bits of a word select one of 2^24 values by an integer table of the inverse distribution function:
    mean 0, variance 1 + 7e-6, largest magnitude 5.42, largest error of the inverse 1.3e-5. Other dtypes hold the
    same values, rounded.

    Args:
        key: int64 `(..., 2)`; each key starts its own stream.
        shape: shape of the draw of one key.
        dtype: any floating dtype.

    Returns:
        `(..., *shape)` of `dtype`.

    Raises:
        TypeError: `key` is not a key, or `dtype` is not floating.
    """
    check_key(key)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; normal draws floating dtypes")
    words = philox.words(key, math.prod(shape))
    return philox.to_normal(words).to(dtype).reshape((*key.shape[:-1], *shape))


def bernoulli(key: Tensor, p: float | Tensor = 0.5, shape: Sequence[int] | None = None) -> Tensor:
    """Draws True with probability `p`: `uniform(key) < p`.

    Args:
        key: int64 `(..., 2)`.
        p: probability in [0, 1], a number or a tensor that broadcasts with the draw.
        shape: shape of the draw of one key; default: the shape of `p`.

    Returns:
        bool `(..., *shape)`.

    Raises:
        TypeError: `key` is not a key.
        ValueError: `p` is a number outside [0, 1].
    """
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"p is {p}; a probability lies in [0, 1]")
    if shape is None:
        shape = p.shape if isinstance(p, Tensor) else ()
    draw: Tensor = uniform(key, shape) < p
    return draw


def rademacher(key: Tensor, shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws +1 or -1 with equal probability (bit 23 of a word, the sign bit of `normal`).

    Args:
        key: int64 `(..., 2)`.
        shape: shape of the draw of one key.
        dtype: a floating or signed integer dtype.

    Returns:
        `(..., *shape)` of `dtype`.

    Raises:
        TypeError: `key` is not a key, or `dtype` cannot hold -1.
    """
    check_key(key)
    if not (dtype.is_floating_point or dtype.is_signed):
        raise TypeError(f"dtype is {dtype}, which cannot hold -1; give a floating or signed integer dtype")
    words = philox.words(key, math.prod(shape))
    return philox.to_sign(words).to(dtype).reshape((*key.shape[:-1], *shape))


def hash_name(name: str) -> int:
    """64-bit FNV-1a of a name: the same in every process, and plain enough to be traced by the compiler."""
    digest = 0xCBF29CE484222325
    for byte in name.encode():
        digest = ((digest ^ byte) * 0x100000001B3) % 2**64
    return digest


@functools.lru_cache(maxsize=1024)
def _hash_names(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple([hash_name(name) for name in names])


def fold_in_names(key: Tensor, names: Sequence[str]) -> Tensor:
    """Keys of many names at once: `stack([fold_in(key, name) for name in names])`, in one Philox call."""
    hashed = tuple([hash_name(name) for name in names]) if torch.compiler.is_compiling() else _hash_names(tuple(names))
    words = torch.tensor([philox.words_of(value) for value in hashed], dtype=torch.int64, device=key.device)
    low, high = words.reshape(-1, 2).unbind(-1)
    return philox.derive(key.unsqueeze(-2), low, high, domain=_NAMES)


def check_key(key: Tensor) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.dim() < 1 or key.shape[-1] != 2:
        shown = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise TypeError(f"key is {shown}; a key is int64 of shape (..., 2), made by biofunc.random.key(seed)")
