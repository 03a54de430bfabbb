"""Parts of a stream: the numbers of a shard, without those of the others.

Element i of a draw is word i % 4 of block i // 4, wherever it is computed. A shard holds runs of consecutive elements:
one run if the leaf is cut along its first axis, one per row if it is cut along another. A run costs the blocks that it
touches: nothing more than its share where it is long, up to four times that where runs are single elements.
"""

import dataclasses

import torch
from torch import Tensor

from biofunc import philox


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Which elements of a leaf a process holds.

    Attributes:
        shape: shape of what it holds.
        length: elements per run.
        first: flat index of the first element, when there is one run.
        starts: flat indices at which runs begin, int64 `(runs,)`; None when there is one.
    """

    shape: tuple[int, ...]
    length: int
    first: int = 0
    starts: Tensor | None = None

    def shifted(self, by: int) -> "Part":
        """The part whose elements come so many later in the stream."""
        starts = None if self.starts is None else self.starts + by
        return dataclasses.replace(self, first=self.first + by, starts=starts)

    def doubled(self) -> "Part":
        """The part of a stream that has two words for each element."""
        starts = None if self.starts is None else 2 * self.starts
        return Part((*self.shape, 2), 2 * self.length, 2 * self.first, starts)

    def blocks(self) -> tuple[int, int, int]:
        """Of one run: its first block, the elements of that block before it, and the elements from there to its end."""
        block, lane = (self.first // 4, self.first % 4) if self.length else (0, 0)
        return block, lane, lane + self.length


def draws(key: Tensor, part: Part, kind: str) -> Tensor:
    """What `philox.draws(key, …, kind)` has at a part, flat.

    Args:
        key: int64 `(2,)`.
        part: which elements of the stream.
        kind: of numbers, a key of `philox.CONVERSIONS`.

    Returns:
        float32 `(elements,)`.
    """
    if part.starts is None:
        block, lane, count = part.blocks()
        return philox.ragged_draws([key], [block], [count], kind)[0][lane:]
    keys, width = _keys_of_runs(key, part.starts, part.length)
    if philox.through_operator(key):
        return _picked(philox.draws(keys, 4 * width, kind), part.starts, part.length)
    return _picked(philox.rows(keys[:, 0], keys[:, 1], width, kind), part.starts, part.length)


def words(key: Tensor, part: Part) -> Tensor:
    """What `philox.words(key, …)` has at a part, flat.

    Args:
        key: int64 `(2,)`.
        part: which elements of the stream.

    Returns:
        int64 `(elements,)`, each below 2^32.
    """
    if part.starts is None:
        block, lane, count = part.blocks()
        offset = philox.advanced(key[1], torch.full_like(key[1], block))
        return philox.words(torch.stack([key[0], offset]), count)[lane:]
    keys, width = _keys_of_runs(key, part.starts, part.length)
    return _picked(philox.words(keys, 4 * width), part.starts, part.length)


def _keys_of_runs(key: Tensor, starts: Tensor, length: int) -> tuple[Tensor, int]:
    """A key for each run, whose stream begins with the block in which the run begins; and the blocks of a run."""
    offset = philox.advanced(key[1], torch.div(starts, 4, rounding_mode="floor"))
    return torch.stack([key[0].expand(offset.shape), offset], -1), (length + 2) // 4 + 1


def _picked(rows: Tensor, starts: Tensor, length: int) -> Tensor:
    """The elements of the runs, out of the whole blocks in which they lie."""
    columns = (starts & 3).unsqueeze(-1) + torch.arange(length, device=rows.device)
    return rows.gather(-1, columns).flatten()
