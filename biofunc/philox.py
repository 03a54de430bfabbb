"""Philox-4x32-10 in tensor operations, and what its words become.

Three rules of the platform shape the code. 32 x 32 bit products are formed without overflow, because signed overflow is
undefined in compiled kernels. A counter starts from the key, not from a bare `arange`, which the compiler would fold
into 32-bit index arithmetic. Normals come from an integer table, because `log` and `cos` differ in the last bit between
eager code, compiled code and devices.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

CACHED = 1 << 14
"""Blocks at a time in eager mode: the generator's temporaries then stay in the cache."""

ACCELERATED = False
"""Whether draws on the CPU go through the compiled kernel of `accelerate`."""

TOGETHER = 1 << 20
"""Values, per member, that the kernel draws for several leaves at once."""

Word = Tensor | int
"""An unsigned 32-bit word, held in int64."""

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(key: tuple[Word, Word], counter: tuple[Word, Word, Word, Word]) -> list[Tensor]:
    """The block of four words at a counter.

    Args:
        key: two words.
        counter: four words.

    Returns:
        Four words, int64.
    """
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
    """The key that the block at a counter makes: its words as two int64.

    Args:
        key: int64 `(..., 2)`.
        low: low word of the counter, broadcast with the keys.
        high: its high word.
        domain: the domain of counters.

    Returns:
        int64 `(..., 2)`.
    """
    if through_operator(key) and not torch.compiler.is_compiling():
        _, *spread = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            *(key[..., 0], torch.as_tensor(low, device=key.device), torch.as_tensor(high, device=key.device))
        )
        derived: Tensor = torch.ops.biofunc.derive(key.expand(*spread[0].shape, 2), *spread, domain)
        return derived
    r0, r1, r2, r3 = blocks(key[..., 0], key[..., 1], low, high, domain)
    return torch.stack([_join(r0, r1), _join(r2, r3)], -1)


def _join(low: Tensor, high: Tensor) -> Tensor:
    """high << 32 | low as a signed int64: the sign of the high word is set before it is moved up."""
    return ((high ^ 0x80000000) - 0x80000000) * 2**32 + low


def words(key: Tensor, count: int) -> Tensor:
    """The first words of the streams of keys `(..., 2)`, shape `(..., count)`."""
    return torch.stack(_stream(key, 0, -(-count // 4)), -1).flatten(-2)[..., :count]


def draws(key: Tensor, count: int, kind: str) -> Tensor:
    """The first words of the streams of keys `(..., 2)` as numbers, shape `(..., count)`."""
    if through_operator(key):
        drawn: Tensor = torch.ops.biofunc.draws(key.unsqueeze(-2), [0], [count], kind)
        return drawn
    size = -(-count // 4)
    if torch.compiler.is_compiling() or size <= CACHED:
        return interleaved(_stream(key, 0, size), CONVERSIONS[kind])[..., :count]
    ends = [*range(0, size, CACHED), size]
    pieces = [interleaved(_stream(key, *ends), CONVERSIONS[kind]) for ends in pairwise(ends)]
    return torch.cat(pieces, -1)[..., :count]


def _stream(key: Tensor, start: int, stop: int) -> list[Tensor]:
    return blocks(key[..., 0:1], key[..., 1:2], torch.arange(start, stop, device=key.device))


def ragged_draws(keys: list[Tensor], starts: list[int], counts: list[int], kind: str) -> list[Tensor]:
    """Draws from keys `(2,)`, from some block of their streams on, in one Philox call, or few of the operator.

    A tree of many leaves then costs as many kernel launches as a single leaf. The blocks lie in rows of one width, each
    of which has one key: what belongs to a key is computed once for a row.
    """
    if not counts:
        return []
    if through_operator(keys[0]):
        leaves: list[Tensor] = []
        for some in _groups(counts):
            values = torch.ops.biofunc.draws(torch.stack(keys[some]), starts[some], counts[some], kind)
            leaves += torch.split(values, counts[some])
        return leaves
    sizes = [-(-count // 4) for count in counts]
    width = _width(sizes)
    heights = [-(-size // width) for size in sizes]
    if not sum(heights):
        return [torch.zeros(0, dtype=torch.float32, device=key.device) for key in keys]
    seed = torch.cat([key[0].expand(height) for key, height in zip(keys, heights, strict=True)])
    first = torch.cat([key[1].expand(height) for key, height in zip(keys, heights, strict=True)])
    ahead = [
        torch.arange(height, device=seed.device) * width + start for start, height in zip(starts, heights, strict=True)
    ]
    drawn = rows(seed, advanced(first, torch.cat(ahead)), width, kind).flatten()
    begins = [4 * width * sum(heights[:i]) for i in range(len(heights))]
    return [drawn[begin : begin + count] for begin, count in zip(begins, counts, strict=True)]


def _groups(counts: Sequence[int]) -> list[slice]:
    """Runs of leaves that the operator draws at once: many small ones, or a large one alone.

    One buffer for all of a large network would be mapped anew, page by page, at each step. The members of an ensemble
    share a buffer all the same; chunks keep that small.
    """
    begins, total = [0], 0
    for index, count in enumerate(counts):
        if total and total + count > TOGETHER:
            begins.append(index)
            total = 0
        total += count
    return [slice(begin, end) for begin, end in pairwise([*begins, len(counts)])]


def _width(sizes: Sequence[int]) -> int:
    """Blocks per row: as many as leave at most an eighth more blocks than rows of 8 do."""
    width = 8
    padded = [sum([-(-size // w) * w for size in sizes]) for w in (8, 16, 32, 64, 128, 256, 512, 1024)]
    for total in padded[1:]:
        if total > padded[0] + padded[0] // 8:
            break
        width *= 2
    return width


def advanced(offset: Tensor, blocks: Tensor) -> Tensor:
    """offset + blocks modulo 2^64, without signed overflow."""
    low = (offset & WORD) + blocks
    return _join(low & WORD, ((offset >> 32) + (low >> 32)) & WORD)


def rows(seed: Tensor, offset: Tensor, width: int, kind: str) -> Tensor:
    """Draws of `width` blocks of each of many keys `(seed, offset)`: `(..., rows)` gives `(..., rows, 4 width)`."""
    count = max(1, CACHED // width)
    if torch.compiler.is_compiling() or seed.shape[-1] <= count:
        index = torch.arange(width, device=seed.device)
        return interleaved(blocks(seed.unsqueeze(-1), offset.unsqueeze(-1), index), CONVERSIONS[kind])
    parts = zip(torch.split(seed, count, -1), torch.split(offset, count, -1), strict=True)
    return torch.cat([rows(*part, width, kind) for part in parts], -2)


def through_operator(tensor: Tensor) -> bool:
    """Whether draws on a tensor's device go through the compiled operators of `accelerate`."""
    return ACCELERATED and tensor.device.type == "cpu"


def interleaved(words: Sequence[Tensor], convert: Callable[[Tensor], Tensor]) -> Tensor:
    """The words of blocks `(..., n)` as numbers `(..., 4 n)`: element j is word j % 4 of block j // 4.

    Compiled, the words are converted before they are put in order, which needs a buffer: of floats, not of int64.
    """
    if torch.compiler.is_compiling():
        return torch.stack([convert(word) for word in words], -1).flatten(-2)
    return convert(torch.stack(list(words), -1).flatten(-2))


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
    q_bits = _float32_bits((((words & 0x7FFFFF) << 1) | 1).to(torch.float32))
    # The clamp changes nothing; it spares the compiled kernel the check of each index
    segment = ((q_bits >> 17) - _FIRST_SEGMENT).clamp(0, _SEGMENTS - 1)
    entry = normal_table(words.device)[segment]
    # Below 2^52: exact in int64. The cast is the only rounding.
    magnitude: Tensor = ((entry >> _FALL_BITS) << 17) - (entry & ((1 << _FALL_BITS) - 1)) * (q_bits & 0x1FFFF)
    return (magnitude * to_sign(words)).to(torch.float32) / (1 << (_QUANTILE_BITS + 17))


def _float32_bits(values: Tensor) -> Tensor:
    """The bits of positive normal floats, int64."""
    if _VMAPS_VIEWS:
        return values.view(torch.int32).to(torch.int64)
    fraction, exponent = torch.frexp(values)
    return (exponent.to(torch.int64) + 125) * 2**23 + (fraction * 2**24).to(torch.int64)


# Before torch 2.13 vmap has no rule for a view of another dtype; frexp costs half a draw more
_VMAPS_VIEWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_FIRST_SEGMENT = 127 << 6  # the float32 bits of q = 1, shifted by 17
_SEGMENTS = 24 * 64
_QUANTILE_BITS = 32
_FALL_BITS = 26


def _make_normal_table() -> Tensor:
    """Quantile at the left end of each segment in units of 2^-32, and its fall across the segment, in one integer."""
    octaves, segments = 24, 64
    tails = [2**octave * (1 + s / segments) / 2**25 for octave in range(octaves) for s in range(segments)] + [0.5]
    quantiles = [round(-NormalDist().inv_cdf(tail) * 2**_QUANTILE_BITS) for tail in tails]
    return torch.tensor([left << _FALL_BITS | (left - right) for left, right in pairwise(quantiles)])


CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": to_uniform,
    "uniform of 11 bits": functools.partial(to_uniform, bits=11),
    "uniform of 8 bits": functools.partial(to_uniform, bits=8),
    "normal": to_normal,
}

_NORMAL_TABLES: dict[torch.device, Tensor] = {torch.device("cpu"): _make_normal_table()}


def normal_table(device: torch.device) -> Tensor:
    """The table of normals on a device. It is kept there, so that the host waits for the device once only."""
    if device in _NORMAL_TABLES:
        return _NORMAL_TABLES[device]
    table = _NORMAL_TABLES[torch.device("cpu")].to(device)
    if not torch.compiler.is_compiling() and outlives_this_call(table):
        _NORMAL_TABLES[device] = table
    return table


def outlives_this_call(tensor: Tensor) -> bool:
    """Whether a new tensor is an ordinary one, neither fake nor the wrapper of a transformation that will end."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
