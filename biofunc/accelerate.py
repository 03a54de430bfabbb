"""Draws by a kernel that is compiled once: the same bits, several times faster in eager mode.

In eager mode the generator is some hundred small operations. The same operations, compiled once for pieces of two fixed
sizes, stand behind one custom operator, which `vmap` and `torch.compile` see as a whole: a compiled step then needs no
generator of its own, so that it also compiles faster.
"""

import functools
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from biofunc import philox

__all__ = ["accelerate"]

PIECES = (1 << 15, 1 << 10)
"""Blocks per call of the compiled kernel: few calls for large draws, little waste for small ones."""


def accelerate(on: bool = True) -> None:
    """Turns compiled draws on the CPU on or off, for the whole process; no number changes.

    The first draw of each kind then takes some seconds, in which the kernel is compiled (or found in the compiler's
    cache). Inside `torch.compile` the operator is called as it is, so that the step compiles faster; turn it on before
    the step is compiled.

    Args:
        on: whether draws on the CPU use the compiled kernel; other devices are not affected.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    if on and not any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        raise RuntimeError("accelerate needs a C++ compiler; install g++, or draw without")
    philox.ACCELERATED = on


@functools.cache
def _kernel(kind: str, rows: int, width: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Writes the draws of some rows into `out`; compiled for this number and width of rows."""

    def fill(seed: Tensor, offset: Tensor, out: Tensor) -> None:
        out.copy_(philox.drawn_rows(seed, offset, width, kind))

    # The compiler counts the versions of a code object and stops at 8: each kernel gets one of its own
    code = fill.__code__.replace(co_name=f"fill_{rows}_rows_of_{width}_{kind.replace(' ', '_')}")
    own = types.FunctionType(code, fill.__globals__, closure=fill.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


@torch.library.custom_op("biofunc::rows", mutates_args=())
def _rows(seed: Tensor, offset: Tensor, width: int, kind: str) -> Tensor:
    seeds, offsets, out = seed.flatten(), offset.flatten(), torch.empty(seed.numel(), 4 * width)
    large, small = [max(1, size // width) for size in PIECES]
    at, rows = 0, len(seeds)
    while at < rows:
        count = large if rows - at >= large else small
        piece = slice(at, at + count)
        if at + count <= rows:
            _kernel(kind, count, width)(seeds[piece], offsets[piece], out[piece])
        else:
            missing, padded = (0, at + count - rows), torch.empty(count, 4 * width)
            _kernel(kind, count, width)(pad(seeds[piece], missing), pad(offsets[piece], missing), padded)
            out[piece] = padded[: rows - at]
        at += count
    return out.reshape(*seed.shape, 4 * width)


@_rows.register_fake
def _(seed: Tensor, offset: Tensor, width: int, kind: str) -> Tensor:
    return seed.new_empty((*seed.shape, 4 * width), dtype=torch.float32)


def _batched(info: Any, dims: tuple[int | None, ...], seed: Tensor, offset: Tensor, width: int, kind: str) -> Any:
    seed, offset = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip((seed, offset), dims, strict=False)
    ]
    return _rows(seed, offset, width, kind), 0


_rows.register_vmap(_batched)
