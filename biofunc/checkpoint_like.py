"""A checkpoint's tree against the tree of the run that goes on: the same structure, paths, shapes and dtypes."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from biofunc import trees
from biofunc.checkpoint_layout import Foreign, Saved, at, joined
from biofunc.sharding import is_sharded
from biofunc.state import DATA, BioState

ABSENT: Any = object()
"""Stands for no tree to compare with; None may be a leaf."""

Place = Callable[[str, Saved, Any], Any]
"""`(path, saved, leaf of like or ABSENT) -> leaf of the result`."""

REMEDY = "make like as the checkpoint's was made, or leave it out and look at what bf.load returns"


def fit(tree: Any, like: Any, place: Place, path: str = "") -> Any:
    """The tree of a checkpoint in the structure of another, with its tensors placed.

    Args:
        tree: from `parse`.
        like: the tree that it must match, or ABSENT.
        place: makes a leaf of the result.
        path: where it stands in the whole.

    Returns:
        The tree; the keys of dicts are in the order of `like`, lists and tuples are what they are there.

    Raises:
        ValueError: the two differ, or the tree holds a node of a class that `like` alone can supply.
    """
    if isinstance(tree, Saved):
        if like is not ABSENT:
            _check_leaf(tree.tensor, like, path)
        return place(path, tree, like)
    if isinstance(tree, Foreign):
        return _fit_foreign(tree, like, place, path)
    if isinstance(tree, BioState):
        return _fit_state(tree, like, place, path)
    if not isinstance(tree, dict | list | tuple):
        if like is not ABSENT and (isinstance(like, Tensor) or (like is not None and trees.one_level(like))):
            raise ValueError(_differ(path, repr(tree), _shown(like)))
        return tree
    if like is ABSENT:
        pairs = [(key, child, ABSENT) for key, child in _items(tree)]
    elif type(like) is not type(tree) and not {type(like), type(tree)} <= {list, tuple}:  # torch takes either
        raise ValueError(_differ(path, _shown(tree), _shown(like)))
    else:
        _check_keys(path, [key for key, _ in _items(tree)], [key for key, _ in _items(like)])
        pairs = [(key, tree[key], child) for key, child in _items(like)]
    fitted = [(key, fit(child, other, place, joined(path, key))) for key, child, other in pairs]
    kind = type(tree) if like is ABSENT else type(like)
    return kind(fitted if isinstance(tree, dict) else [child for _, child in fitted])


def _differ(path: str, saved: str, given: str) -> str:
    return f"{at(path)} is {saved} in the checkpoint and {given} in like; {REMEDY}"


def placed(saved: Tensor, like: Any, device: torch.device | str | None, path: str) -> Tensor:
    """A tensor of a checkpoint where the run wants it.

    Args:
        saved: its values, or their shape and dtype on the meta device: the result is then yet to be filled.
        like: the leaf in whose place it comes, or ABSENT.
        device: the device of plain tensors; default: that of like, else the CPU.
        path: where it stands.

    Returns:
        The tensor.

    Raises:
        ValueError: there is no device that holds values.
        TypeError: DTensors of such placements cannot be filled.
    """
    if is_sharded(like):
        from biofunc import checkpoint_sharded

        return checkpoint_sharded.distributed(saved, cast(Any, like), path)
    target = torch.device(device if device is not None else "cpu" if like is ABSENT else like.device)
    if target.type == "meta":
        raise ValueError(f"{at(path)} is on the meta device in like; say where it comes to: bf.load(…, device='cpu')")
    return torch.empty(saved.shape, dtype=saved.dtype, device=target) if saved.is_meta else saved.to(target)


def _fit_state(tree: BioState, like: Any, place: Place, path: str) -> BioState:
    if like is not ABSENT and type(like) is not BioState:
        raise ValueError(_differ(path, "a BioState", _shown(like)))
    parts = {}
    for field in DATA:
        other = ABSENT if like is ABSENT else getattr(like, field)
        parts[field] = fit(getattr(tree, field), other, place, joined(path, field))
    for static in ("layout", "fresh"):
        saved = getattr(tree, static)
        given = saved if like is ABSENT else getattr(like, static)
        if saved != given:
            first = (sorted(set(saved) ^ set(given), key=repr) or [saved[0]])[0]
            raise ValueError(
                f"{at(joined(path, static))} differs between the checkpoint and like, first at {first}; the state was "
                f"made for other parameters or rules: {REMEDY}"
            )
    return tree.replace(**parts)


def _fit_foreign(tree: Foreign, like: Any, place: Place, path: str) -> Any:
    if like is ABSENT:
        raise ValueError(
            f"{at(path)} is a {tree.name}, which a file cannot make; bf.load(path, like=tree) takes it from a tree of "
            "the same structure"
        )
    node = trees.one_level(like) if like is not None else None
    kind = type(like)
    if node is None or f"{kind.__module__}.{kind.__qualname__}" != tree.name:
        raise ValueError(_differ(path, f"a {tree.name}", _shown(like)))
    entries, children, rebuild = node
    _check_keys(path, list(tree.children), [str(entry) for entry in entries])
    pairs = zip(tree.children.items(), children, strict=True)
    return rebuild([fit(child, other, place, joined(path, entry)) for (entry, child), other in pairs])


def _check_leaf(saved: Tensor, like: Any, path: str) -> None:
    if not isinstance(like, Tensor):
        raise ValueError(_differ(path, f"a tensor of shape {tuple(saved.shape)}", _shown(like)))
    if saved.shape != like.shape:
        raise ValueError(_differ(path, f"of shape {tuple(saved.shape)}", str(tuple(like.shape))))
    if saved.dtype != like.dtype:
        raise ValueError(_differ(path, f"of dtype {saved.dtype}", str(like.dtype)))


def _check_keys(path: str, saved: list[Any], given: list[Any]) -> None:
    for some, others, where in (
        (saved, set(given), "in the checkpoint and not in like"),
        (given, set(saved), "in like and not in the checkpoint"),
    ):
        for key in some:
            if key not in others:
                raise ValueError(f"{at(joined(path, key))} is {where}; {REMEDY}")


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _shown(thing: Any) -> str:
    return "a tensor" if isinstance(thing, Tensor) else f"a {type(thing).__name__}"
