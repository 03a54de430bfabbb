"""Ensembles: many members as one tree with a leading member axis, for `vmap`."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from biofunc import trees
from biofunc.trees import Leaves

__all__ = ["init", "stack", "unstack"]

T = TypeVar("T")


def init(make_model: Callable[[], nn.Module], seeds: Iterable[int]) -> tuple[Leaves, Leaves]:
    """Initialises an ensemble: one model per seed, stacked.

    Member i depends on its seed alone, not on the other members or their number. The global generators are left as
    they were.

    Args:
        make_model: builds a model with PyTorch's own initialisation; called once per seed. It seeds nothing itself:
            else all members are alike.
        seeds: integers in [-2^63, 2^64), one per member; equal seeds give equal members.

    Returns:
        Parameters and buffers `{name: tensor}` with a leading member axis, detached, for
        `torch.func.functional_call(make_model(), (params, buffers), x)` inside `vmap`.

    Raises:
        TypeError: a seed is not an integer, or `make_model` returns no module.
        ValueError: no seeds, a seed beyond 64 bits, members of different shapes, or a layer keeps running statistics.
    """
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(f"make_model is {type(make_model).__name__}; give a function that builds one, lambda: Model(…)")
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds is {seeds!r}; give one integer per member, range(100)")
    seeds = list(seeds)
    if not seeds:
        raise ValueError("seeds is empty; an ensemble has at least one member")
    members: list[tuple[Leaves, Leaves]] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"seeds holds {seed!r}; every seed is an integer")
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"seeds holds {seed}; every seed lies in [-2^63, 2^64)")
            torch.manual_seed(seed)
            model = make_model()
            if not isinstance(model, nn.Module):
                raise TypeError(f"make_model returned {type(model).__name__}; it must return an nn.Module")
            _check_statistics(model)
            members.append(
                (
                    {name: p.detach() for name, p in model.named_parameters()},
                    {name: b.detach() for name, b in model.named_buffers()},
                )
            )
    return stack(members)


def stack(members: Sequence[T]) -> T:
    """Stacks trees of tensors (parameters, states, tuples of them) into one with a leading member axis.

    Args:
        members: trees of one structure, at least one.

    Returns:
        One tree; leaf i is `torch.stack` of the members' leaves.

    Raises:
        ValueError: no members, or trees or shapes that differ.
        TypeError: dtypes that differ.
    """
    if not members:
        raise ValueError("members is empty; stack takes at least one tree")
    first, structure = trees.flatten(members[0])
    flat = [trees.flatten(member) for member in members]
    for index, (leaves, other) in enumerate(flat):
        if other != structure:
            raise ValueError(f"member {index} is a tree of another structure than member 0: {other} and {structure}")
        for path, leaf in leaves.items():
            if leaf.shape != first[path].shape:
                shapes = f"{tuple(leaf.shape)} in member {index} and {tuple(first[path].shape)} in member 0"
                raise ValueError(f"leaf '{path}' has shape {shapes}; all members of an ensemble are shaped alike")
            if leaf.dtype != first[path].dtype:
                dtypes = f"{leaf.dtype} in member {index} and {first[path].dtype} in member 0"
                raise TypeError(f"leaf '{path}' has dtype {dtypes}; all members of an ensemble have the same dtypes")
    stacked: T = trees.unflatten(structure, {path: torch.stack([leaves[path] for leaves, _ in flat]) for path in first})
    return stacked


def unstack(tree: T) -> list[T]:
    """Takes a stacked tree apart; each member runs on alone.

    Args:
        tree: a tree of tensors with a common leading member axis.

    Returns:
        The members, as contiguous copies that share no memory with the ensemble.

    Raises:
        ValueError: leaves without a common leading axis.
    """
    flat, structure = trees.flatten(tree)
    sizes = {path: leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for path, leaf in flat.items()}
    for path, size in sizes.items():
        if size is None or size != next(iter(sizes.values())):
            raise ValueError(f"leaf '{path}' has {size} members, the first leaf {next(iter(sizes.values()))}")
    count = next(iter(sizes.values()), 0) or 0
    return [trees.unflatten(structure, {path: leaf[i].clone() for path, leaf in flat.items()}) for i in range(count)]


def _check_statistics(model: nn.Module) -> None:
    tracking = [name for name, module in model.named_modules() if getattr(module, "track_running_stats", False)]
    if tracking:
        raise ValueError(
            f"layers {', '.join(tracking)} keep running statistics (track_running_stats=True), which vmap cannot "
            "update in place; call torch.func.replace_all_batch_norm_modules_(model) in make_model"
        )
