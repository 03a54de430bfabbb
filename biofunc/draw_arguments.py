"""What is asked of a draw, its shape, dtype and parameters, checked; and which part of it is drawn here.

Of a draw that is like a DTensor, each process draws the part that it holds.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc.parts import Part
from biofunc.sharding import assembled, check_unwrapped, is_sharded, part_of


def check_shape(shape: Any) -> None:
    """Refuses what is not a shape.

    Args:
        shape: what was given.

    Raises:
        TypeError: it is no sequence of integers of at least 0.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape is {shape!r}; give a tuple of integers, ({shape},)")
    for length in shape:
        if isinstance(length, bool) or not isinstance(length, int | torch.SymInt) or length < 0:
            raise TypeError(f"shape is {tuple(shape)}; it must hold integers of at least 0")


def check_number(name: str, value: Any) -> None:
    """Refuses a parameter of a distribution that is neither a tensor nor a number.

    Args:
        name: of the parameter, for the message.
        value: what was given, if it is no tensor.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a number or a tensor")


def is_floating(dtype: Any) -> bool:
    """Whether something is a floating dtype."""
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def wanted_part(key: Tensor, shape: Sequence[int], like: Tensor | None) -> tuple[Part | None, Sequence[int]]:
    """The part that is drawn here, if not all is, and its shape.

    Args:
        key: int64 `(..., 2)`; of one draw if `like` is a DTensor.
        shape: shape of the draw of one key; () where `like` stands for it.
        like: as for `random.uniform`.

    Returns:
        The part, None if all is drawn here; and the shape of what is drawn here.

    Raises:
        TypeError: `shape` is not a shape, or `like` is a DTensor inside a transformation of torch.func.
        ValueError: `like` has another shape than `shape`, or is a DTensor and `key` holds several keys.
    """
    check_shape(shape)
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


def shaped(draw: Tensor, key: Tensor, shape: Sequence[int], like: Tensor | None) -> Tensor:
    """A draw in the shape asked for.

    Args:
        draw: the numbers, flat, of each key.
        key: int64 `(..., 2)`.
        shape: from `wanted_part`.
        like: as for `random.uniform`.

    Returns:
        `(..., *shape)`, or the DTensor of which it is this process's part.
    """
    draw = draw.reshape((*key.shape[:-1], *shape))
    return draw if like is None else assembled(draw, like)
