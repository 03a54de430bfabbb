"""Philox-4x32-10 in tensor operations, and what its words become.

Three rules of the platform shape the code. 32 x 32 bit products are formed without overflow, because signed overflow is
undefined in compiled kernels. A counter starts from the key, not from a bare `arange`, which the compiler would fold
into 32-bit index arithmetic. Normals come from an integer table, because `log` and `cos` differ in the last bit between
eager code, compiled code and devices.
"""

from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

Word = Tensor | int
"""An unsigned 32-bit word, held in int64."""

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]) -> list[Tensor]:
    """The block of four words at a counter."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for round_ in range(ROUNDS):
        if round_:
            k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return [c0, c1, c2, c3]  # type: ignore[list-item]  # tensors, from the second round on


def _multiply(a: Word, multiplier: int) -> tuple[Word, Word]:
    """High and low word of a 32 x 32 bit product. a (m - 2^32) stays above -2^62, so nothing overflows."""
    product = a * (multiplier - 2**32)
    return (product >> 32) + a, product & WORD


def words_of(data: int) -> tuple[int, int]:
    """Low and high word of an integer modulo 2^64."""
    return data & WORD, (data >> 32) & WORD


def blocks(seed: Tensor, offset: Tensor, low: Word, high: Word = 0, domain: int = 0) -> list[Tensor]:
    """The blocks of keys `(seed, offset)` at counters offset + (high << 32 | low), in one domain of counters."""
    low_sum = (offset & WORD) + low
    high_sum = ((offset >> 32) + (low_sum >> 32) + high) & WORD
    return philox((seed & WORD, (seed >> 32) & WORD), (low_sum & WORD, high_sum, domain, 0))


def derive(key: Tensor, low: Word, high: Word = 0, domain: int = 0) -> Tensor:
    """The key that the block at a counter makes: its words as two int64."""
    r0, r1, r2, r3 = blocks(key[..., 0], key[..., 1], low, high, domain)
    return torch.stack([_join(r0, r1), _join(r2, r3)], -1)


def _join(low: Tensor, high: Tensor) -> Tensor:
    """high << 32 | low as a signed int64: the sign of the high word is set before it is moved up."""
    return ((high ^ 0x80000000) - 0x80000000) * 2**32 + low


def words(key: Tensor, count: int) -> Tensor:
    """The first words of the streams of keys `(..., 2)`, shape `(..., count)`."""
    index = torch.arange(-(-count // 4), device=key.device)
    return torch.stack(blocks(key[..., 0:1], key[..., 1:2], index), -1).flatten(-2)[..., :count]


def ragged_words(keys: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`[words(key, count) for key, count in zip(keys, counts)]` for keys `(2,)`, in one Philox call.

    A tree of many leaves then costs as many kernel launches as a single leaf.
    """
    if not keys:
        return []
    sizes = [-(-count // 4) for count in counts]
    seed = torch.cat([key[0].expand(size) for key, size in zip(keys, sizes, strict=True)])
    offset = torch.cat([key[1].expand(size) for key, size in zip(keys, sizes, strict=True)])
    index = torch.cat([torch.arange(size, device=seed.device) for size in sizes])
    flat = torch.stack(blocks(seed, offset, index), -1).flatten()
    starts = [4 * sum(sizes[:i]) for i in range(len(sizes))]
    return [flat[start : start + count] for start, count in zip(starts, counts, strict=True)]


def to_uniform(words: Tensor, bits: int = 24) -> Tensor:
    """float32 uniforms of [0, 1): the low bits of a word over 2^bits."""
    return (words & ((1 << bits) - 1)).to(torch.float32) / (1 << bits)


def to_sign(words: Tensor) -> Tensor:
    """+1 or -1, int64: bit 23 of a word."""
    return 1 - ((words >> 22) & 2)


def to_normal(words: Tensor) -> Tensor:
    """float32 normals, by integers alone.

    q = 2 (word mod 2^23) + 1 stands for the tail probability q / 2^25. The float32 bits of q index a table with 64
    segments per octave; the 17 mantissa bits below interpolate inside a segment.
    """
    q_bits = (((words & 0x7FFFFF) << 1) | 1).to(torch.float32).view(torch.int32).to(torch.int64)
    segment = (q_bits >> 17) - _FIRST_SEGMENT
    quantile, fall = _normal_table(words.device)
    # Below 2^52: exact in int64 and in float64. The last cast is the only rounding.
    magnitude: Tensor = (quantile[segment] << 17) - fall[segment] * (q_bits & 0x1FFFF)
    signed = magnitude * to_sign(words)
    return (signed.to(torch.float64) / (1 << (_QUANTILE_BITS + 17))).to(torch.float32)


_FIRST_SEGMENT = 127 << 6  # the float32 bits of q = 1, shifted by 17
_QUANTILE_BITS = 32


def _make_normal_table() -> Tensor:
    """Quantiles at the left ends of the segments in units of 2^-32, and their fall across a segment."""
    octaves, segments = 24, 64
    tails = [2**octave * (1 + s / segments) / 2**25 for octave in range(octaves) for s in range(segments)] + [0.5]
    quantiles = [round(-NormalDist().inv_cdf(tail) * 2**_QUANTILE_BITS) for tail in tails]
    return torch.tensor([quantiles[:-1], [left - right for left, right in pairwise(quantiles)]])


_NORMAL_TABLES: dict[torch.device, Tensor] = {torch.device("cpu"): _make_normal_table()}


def prepare(device: torch.device) -> None:
    """Puts the table of normals on a device, so that no step has to."""
    if device not in _NORMAL_TABLES:
        _NORMAL_TABLES[device] = _NORMAL_TABLES[torch.device("cpu")].to(device)


def _normal_table(device: torch.device) -> Tensor:
    return _NORMAL_TABLES[device] if device in _NORMAL_TABLES else _NORMAL_TABLES[torch.device("cpu")].to(device)
