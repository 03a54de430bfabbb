"""What the measures share: which leaves are measured, and in what form."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc import trees
from biofunc.rule import compute_dtype
from biofunc.selection import Selection, select_paths, warn_of_stack
from biofunc.sharding import whole
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree


def check_floating(name: str, flat: Mapping[str, Any]) -> None:
    """Raises a TypeError that names the first leaf which is not a floating-point tensor."""
    for path, leaf in flat.items():
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            found = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            place = f"{name} leaf '{path}'" if path else name
            raise TypeError(f"{place} is of {found}; it must be a floating-point tensor")


def check_not_negative(name: str, value: float | Tensor) -> None:
    """Refuses a number below 0; a tensor passes.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        TypeError: it is neither a tensor nor a number.
        ValueError: it is below 0.
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a number or a tensor")
    if not value >= 0:
        raise ValueError(f"{name} is {value}; it must be 0 or larger")


def selected(flat: Leaves, where: Selection | BioState) -> list[str]:
    """Paths of the leaves that are measured.

    Args:
        flat: leaves by path.
        where: a selection, or a state whose synapses are meant; None: leaves of two axes or more, all if there is none.

    Returns:
        Paths, in the order of the tree.

    Raises:
        KeyError: a state has a synapse that the tree lacks.
        KeyError, TypeError, ValueError: a selection does not fit the leaves.
    """
    if isinstance(where, BioState):
        missing = [path for path in where.plasticity if path not in flat]
        if missing:
            raise KeyError(f"where is a state with the synapses '{missing[0]}', which the tree lacks")
        return list(where.plasticity)
    if where is None:
        warn_of_stack("leaves", flat, "measure an ensemble under torch.vmap")
        return [path for path, leaf in flat.items() if leaf.dim() >= 2] or list(flat)
    return select_paths(where, flat)


def computed(leaf: Tensor) -> Tensor:
    """A leaf without its gradient, half precision as float32, and gathered if processes share it."""
    return whole(leaf.detach()).to(compute_dtype(leaf))


def joined(leaves: Sequence[Tensor]) -> Tensor:
    """All leaves in a row."""
    return torch.cat([leaf.reshape(-1) for leaf in leaves]) if leaves else torch.zeros(0)


def all_weights(params: Tree, where: Selection | BioState) -> Tensor:
    """All selected weights in a row, 0 where one is not finite.

    Args:
        params: tree of parameters.
        where: as for `selected`.

    Returns:
        One axis, half precision as float32.

    Raises:
        TypeError: a leaf is no floating-point tensor.
        KeyError, TypeError, ValueError: as for `selected`.
    """
    flat, _ = trees.flatten(params)
    check_floating("params", flat)
    w = joined([computed(flat[path]) for path in selected(flat, where)])
    return torch.where(torch.isfinite(w), w, 0.0)
