"""Pytrees by path. The only file that knows optree.

Trees of parameters come in as users keep them (a dict of names, nested dicts, tuples, dataclasses) and are
handled inside as flat dicts `{path: leaf}`. A path joins the entries of the tree by "/": the flat dict of a
module gives "fc1.weight", a nested tree gives "layers/0/w". Paths, not positions, identify a leaf everywhere:
optree sorts dict keys and `torch.utils._pytree` does not, so positions of the two never agree.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor

from biofunc.sharding import check_placement, local

Tree: TypeAlias = Any
Leaves: TypeAlias = dict[str, Tensor]

NAMESPACE = "biofunc"


def flatten(tree: Tree) -> tuple[dict[str, Any], optree.PyTreeSpec]:
    """Flat dict of a tree's leaves by path, and what `unflatten` needs to put them back."""
    paths, leaves, structure = optree.tree_flatten_with_path(tree, namespace=NAMESPACE)
    flat = {"/".join([str(entry) for entry in path]): leaf for path, leaf in zip(paths, leaves, strict=True)}
    if len(flat) < len(leaves):
        raise ValueError("two leaves of the tree have the same path; rename a dict key that contains '/'")
    return flat, structure


def leaves(tree: Tree) -> list[Any]:
    """A tree's leaves, whatever their paths."""
    return optree.tree_leaves(tree, namespace=NAMESPACE)


def unflatten(structure: optree.PyTreeSpec, flat: dict[str, Any]) -> Tree:
    """The tree whose leaves are the values of `flat`, in the order in which `flatten` gave them."""
    return optree.tree_unflatten(structure, flat.values())


def one_level(node: Any) -> tuple[tuple[Any, ...], list[Any], Callable[[list[Any]], Any]] | None:
    """Entries and children of a node, and the function that makes such a node of other children; None for a leaf."""
    try:
        children, metadata, entries, unflatten, *_ = optree.tree_flatten_one_level(node, namespace=NAMESPACE)
    except ValueError:
        return None
    return tuple(entries), list(children), lambda children: unflatten(metadata, children)


def register(
    cls: type,
    children: Callable[[Any], tuple[Any, ...]],
    static: Callable[[Any], Any],
    rebuild: Callable[[Any, Any], Any],
    names: tuple[str, ...],
) -> None:
    """Registers a node class with optree; torch's own registry is its owner's concern."""
    optree.register_pytree_node(
        cls,
        lambda node: (children(node), static(node), names),
        lambda metadata, values: rebuild(values, metadata),
        path_entry_type=optree.GetAttrEntry,
        namespace=NAMESPACE,
    )


def zero_of(leaves: Iterable[Tensor], device: torch.device) -> Tensor:
    """An int64 0 that is, inside vmap, batched and contiguous if any of the leaves on the device is."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    for leaf in leaves:
        if leaf.device == device:
            zero = zero + local(leaf.detach()).reshape(-1)[:0].ne(0).sum()
    return zero


def check_given(params: Tree) -> None:
    """Raises a TypeError for None, which would pass for a tree without leaves."""
    if params is None:
        raise TypeError("params is None; give a tree of tensors, dict(model.named_parameters())")


def check_params(params: dict[str, Any]) -> None:
    """Raises a TypeError that names the first leaf which is not a floating-point tensor."""
    for path, leaf in params.items():
        if not isinstance(leaf, Tensor) and not path:
            raise TypeError(f"params is {type(leaf).__name__}; give a tree of tensors, dict(model.named_parameters())")
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"params leaf '{path}' is {type(leaf).__name__}; each leaf must be a floating-point tensor, "
                "and a class of your own a node: optree.register_pytree_node(…, namespace='biofunc')"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"params leaf '{path}' has dtype {leaf.dtype}; learning moves floating-point leaves only: "
                "keep integer and complex tensors among the buffers"
            )
        check_placement(path, leaf)


def check_none(name: str, tree: Tree, params: Leaves) -> None:
    """Raises a TypeError that names the first leaf which is None where the parameters have one: `flatten` drops it."""
    paths, leaves, _ = optree.tree_flatten_with_path(tree, none_is_leaf=True, namespace=NAMESPACE)
    for entries, leaf in zip(paths, leaves, strict=True):
        path = "/".join([str(entry) for entry in entries])
        if leaf is None and path in params:
            raise TypeError(
                f"{name} leaf '{path}' is None: was backward() called, and does the loss depend on the parameter? "
                "Give torch.zeros_like(p) for one that is not used"
            )


def check_like(name: str, given: dict[str, Any], params: Leaves) -> None:
    """Raises an error that names the first path at which a tree does not match the parameters."""
    for path in params:
        if path not in given:
            raise KeyError(f"{name} has no leaf '{path}' that params has; hand over one {name} leaf per parameter")
    for path, leaf in given.items():
        if path not in params:
            raise KeyError(f"{name} has a leaf '{path}' that params lacks")
        weight = params[path]
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} leaf '{path}' is {type(leaf).__name__}; it must be a tensor like the parameter")
        if leaf.shape != weight.shape:
            raise ValueError(f"{name} leaf '{path}' has shape {tuple(leaf.shape)}, the parameter {tuple(weight.shape)}")
        if leaf.dtype != weight.dtype:
            raise TypeError(f"{name} leaf '{path}' has dtype {leaf.dtype}, the parameter {weight.dtype}; cast one")
