"""Keys: where noise starts, and how one key becomes many.

A key is two int64, `(seed, offset)`: the seed and the first counter of a Philox stream. Names are folded in under a
counter domain of their own, so that they cannot meet integers.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from biofunc import philox

_NAMES = 1


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


def hash_name(name: str) -> int:
    """64-bit FNV-1a of a name: the same in every process, and plain enough to be traced by the compiler."""
    digest = 0xCBF29CE484222325
    for byte in list(name.encode()):  # the compiler of torch 2.11 goes through no bytes
        digest = ((digest ^ byte) * 0x100000001B3) % 2**64
    return digest


@functools.lru_cache(maxsize=1024)
def _hash_names(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple([hash_name(name) for name in names])


def fold_in_names(key: Tensor, names: Sequence[str]) -> Tensor:
    """Keys of many names at once: `stack([fold_in(key, name) for name in names])`, in one Philox call."""
    low, high = _words_of(tuple(names), key.device).unbind(-1)
    return philox.derive(key.unsqueeze(-2), low, high, domain=_NAMES)


_WORDS: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}


def _words_of(names: tuple[str, ...], device: torch.device) -> Tensor:
    """The hashes of names as words, `(names, 2)`.

    On other devices than the CPU they are kept: to copy them there at each step would make the host wait for the
    device.
    """
    eager = not torch.compiler.is_compiling()
    if eager and (names, device) in _WORDS:
        return _WORDS[names, device]
    hashed = _hash_names(names) if eager else tuple([hash_name(name) for name in names])
    words = torch.tensor([philox.words_of(value) for value in hashed], dtype=torch.int64, device=device).reshape(-1, 2)
    if eager and device.type != "cpu" and philox.outlives_this_call(words):
        if len(_WORDS) >= 1024:
            _WORDS.clear()
        _WORDS[names, device] = words
    return words


def check_key(key: Tensor) -> None:
    """Refuses what is neither a key nor a batch of keys.

    Args:
        key: what was given.

    Raises:
        TypeError: it is no int64 tensor `(..., 2)`.
    """
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.dim() < 1 or key.shape[-1] != 2:
        shown = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise TypeError(f"key is {shown}; a key is int64 of shape (..., 2), made by biofunc.random.key(seed)")
