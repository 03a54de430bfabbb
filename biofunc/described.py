"""Trees as JSON: what a process that has never seen a tree must know to build one like it."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from biofunc.state import BioState

MAPPINGS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "OrderedDict": OrderedDict}
SEQUENCES: dict[str, type[list[Any]] | type[tuple[Any, ...]]] = {"list": list, "tuple": tuple}
STATIC = ("fresh", "layout")
"""Fields of a BioState that hold no tensors but tuples of texts and numbers."""


def describe(tree: Any) -> list[Any]:
    """A tree without its numbers.

    Args:
        tree: of dicts, lists, tuples, BioStates and tensors; of all else the class alone is told.

    Returns:
        Lists, texts and numbers, `[kind, ...]`, which `json.dumps` takes.
    """
    name = type(tree).__name__
    if isinstance(tree, Tensor):
        return ["tensor", str(tree.dtype).removeprefix("torch."), list(tree.shape), tree.device.type]
    if tree is None:
        return ["none"]
    if isinstance(tree, BioState):
        fields = vars(tree).items()
        return ["state", {field: value if field in STATIC else describe(value) for field, value in fields}]
    if MAPPINGS.get(name) is type(tree) and all([isinstance(key, (str, int)) for key in tree]):
        return [name, [[key, describe(value)] for key, value in tree.items()]]
    if SEQUENCES.get(name) is type(tree):
        return [name, [describe(value) for value in tree]]
    return ["other", f"{type(tree).__module__}.{type(tree).__qualname__}"]


def build(description: list[Any]) -> Any:
    """A tree like the one described, but of no members; `unbuildable` says whether it can be built."""
    kind, *rest = description
    if kind == "tensor":
        dtype, shape, device = rest
        return torch.empty((0, *shape[1:]), dtype=getattr(torch, dtype), device=device)
    if kind == "none":
        return None
    if kind == "state":
        fields = {name: _tuples(value) if name in STATIC else build(value) for name, value in rest[0].items()}
        return BioState(**fields)
    if kind in MAPPINGS:
        return MAPPINGS[kind]([(key, build(value)) for key, value in rest[0]])
    return SEQUENCES[kind]([build(value) for value in rest[0]])


def unbuildable(description: list[Any]) -> str | None:
    """The first class in a described tree of which nothing but its name is known.

    Args:
        description: from `describe`.

    Returns:
        The name, or None: `build` makes the tree.
    """
    kind, *rest = description
    if kind == "other":
        return str(rest[0])
    inner: list[Any] = []
    if kind == "state":
        inner = [value for name, value in rest[0].items() if name not in STATIC]
    elif kind in MAPPINGS:
        inner = [value for _, value in rest[0]]
    elif kind in SEQUENCES:
        inner = rest[0]
    return next((found for value in inner if (found := unbuildable(value)) is not None), None)


def _tuples(value: Any) -> Any:
    return tuple([_tuples(entry) for entry in value]) if isinstance(value, list) else value
