"""Ensembles: many members as one tree with a leading member axis, for `vmap`.

On the CPU a large ensemble runs better in chunks: `split` it, run every chunk through the same compiled step, `join` it
again. The tensors of one chunk stay in the processor's cache, and only one chunk at a time is held twice. `shard` and
`gather` do the same over many processes or machines.
"""

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from biofunc import trees
from biofunc.sharded_ensemble import gather, shard
from biofunc.sharding import check_module
from biofunc.trees import Leaves

__all__ = ["gather", "init", "join", "shard", "split", "stack", "unstack"]

T = TypeVar("T")


def init(make_model: Callable[[], nn.Module], seeds: Iterable[int]) -> tuple[Leaves, Leaves]:
    """Initialises an ensemble: one model per seed, stacked.

    Member i depends on its seed alone, not on the other members or their number. The global generators are left as
    they were.

    Args:
        make_model: builds a model with PyTorch's own initialisation; called once per seed. It seeds nothing itself:
            else all members are alike.
        seeds: integers in [-2^63, 2^64), one per member, NumPy's and those of a tensor too; equal seeds give equal
            members.

    Returns:
        Parameters and buffers `{name: tensor}` with a leading member axis, detached, for
        `torch.func.functional_call(make_model(), (params, buffers), x)` inside `vmap`.

    Raises:
        TypeError: a seed is not an integer, or `make_model` returns no module, or one that FSDP has wrapped.
        ValueError: no seeds, a seed beyond 64 bits, members of different shapes, or a layer keeps running statistics.
    """
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(f"make_model is {type(make_model).__name__}; give a function that builds one, lambda: Model(…)")
    if not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) == 0:
        raise TypeError(f"seeds is {seeds!r}; give one integer per member, range(100)")
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else list(seeds)
    if not seeds:
        raise ValueError("seeds is empty; an ensemble has at least one member")
    members: list[tuple[Leaves, Leaves]] = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for seed in map(_whole, seeds):
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"seeds holds {seed}; every seed lies in [-2^63, 2^64)")
            torch.manual_seed(seed)
            model = make_model()
            if not isinstance(model, nn.Module):
                raise TypeError(f"make_model returned {type(model).__name__}; it must return an nn.Module")
            check_module("make_model", model)
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
        TypeError: dtypes that differ, a leaf that is no tensor, or one tree in place of several.
    """
    if isinstance(members, Mapping | str) or not isinstance(members, Iterable):
        raise TypeError(f"members is {type(members).__name__}; give a list of trees, stack([first, second])")
    flat = [trees.flatten(member) for member in members]
    if not flat:
        raise ValueError("members is empty; stack takes at least one tree")
    check_alike(flat, "member")
    first, structure = flat[0]
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
    members = count_members(flat)
    return [trees.unflatten(structure, {path: leaf[i].clone() for path, leaf in flat.items()}) for i in range(members)]


def split(tree: T, size: int) -> list[T]:
    """Takes a stacked tree apart into chunks of `size` members, all of one shape.

        chunks = bf.ensemble.split((params, state), 64)
        del params, state
        for x, y in batches:
            for i, chunk in enumerate(chunks):
                chunks[i] = ensemble_step(*chunk, x, y)
        params, state = bf.ensemble.join(chunks, members=1000)

    The last chunk is filled up with copies of its last member, which `join` drops. A compiled step therefore sees one
    shape and is compiled once, whatever the number of members; and a member gets the same numbers, bit for bit, in an
    ensemble of any number of members, so long as the size of the chunks is the same.

    The chunks need as much memory as the ensemble: delete that, as above, to hold it once only. A list comprehension
    in place of the inner loop would hold all old chunks until the last new one is made.

    How large should a chunk be? As large as fits the processor's cache with all that a step reads and writes. In
    docs/benchmarks.md a step of one of 512 perceptrons 64-128-10 takes 78 us in chunks of 16, 60 of 32, 51 of 64, 49 of
    128 and 55 whole, with two threads. Time two or three sizes.

    Args:
        tree: a tree of tensors with a common leading member axis.
        size: members per chunk, >= 1.

    Returns:
        The chunks, as contiguous copies that share no memory with the ensemble or with each other.

    Raises:
        TypeError: size is not an integer.
        ValueError: size below 1, no members, or leaves without a common leading axis.
    """
    check_whole("size", size)
    flat, structure = trees.flatten(tree)
    members = count_members(flat)
    if not members:
        raise ValueError("tree has no members; split takes at least one")
    chunks: list[T] = []
    for start in range(0, members, size):
        chosen = torch.arange(start, start + size).clamp(max=members - 1)
        on_device = {device: chosen.to(device) for device in {leaf.device for leaf in flat.values()}}
        leaves = {path: leaf.index_select(0, on_device[leaf.device]).contiguous() for path, leaf in flat.items()}
        chunks.append(trees.unflatten(structure, leaves))
    return chunks


def join(chunks: Sequence[T], members: int) -> T:
    """Puts the chunks of `split` together again and drops what filled the last one up.

    Args:
        chunks: trees of one structure and one number of members, at least one.
        members: members of the whole ensemble, so many that the last chunk holds at least one of them.

    Returns:
        One tree with a leading member axis, as contiguous copies that share no memory with the chunks.

    Raises:
        TypeError: members is not an integer, or dtypes that differ.
        ValueError: no chunks, trees or shapes that differ, leaves without a common leading axis, or members that the
            chunks cannot hold, or of which none lies in the last chunk.
    """
    check_whole("members", members)
    if not chunks:
        raise ValueError("chunks is empty; join takes at least one tree")
    flat = [trees.flatten(chunk) for chunk in chunks]
    size, *_ = [count_members(leaves) for leaves, _ in flat]
    check_alike(flat, "chunk")
    fewest, most = size * (len(chunks) - 1) + 1, size * len(chunks)
    if not fewest <= members <= most:
        raise ValueError(
            f"members is {members}, but {len(chunks)} chunks of {size} hold {fewest} to {most}; give the number that "
            "was split"
        )
    sizes = [size] * (len(chunks) - 1) + [members - fewest + 1]
    first, structure = flat[0]
    whole = {
        path: torch.cat([leaves[path][:count] for (leaves, _), count in zip(flat, sizes, strict=True)]).contiguous()
        for path in first
    }
    joined: T = trees.unflatten(structure, whole)
    return joined


def check_alike(flat: Sequence[tuple[Leaves, Any]], word: str) -> None:
    """Raises an error that names the first tree, leaf or dtype unlike the first one's."""
    first, structure = flat[0]
    for index, (leaves, other) in enumerate(flat):
        if other != structure:
            raise ValueError(f"{word} {index} is a tree of another structure than {word} 0: {other} and {structure}")
        for path, leaf in leaves.items():
            if not isinstance(leaf, Tensor):
                raise TypeError(f"leaf '{path}' is {type(leaf).__name__} in {word} {index}; all leaves are tensors")
            if leaf.shape != first[path].shape:
                shapes = f"{tuple(leaf.shape)} in {word} {index} and {tuple(first[path].shape)} in {word} 0"
                raise ValueError(f"leaf '{path}' has shape {shapes}; all {word}s of an ensemble are shaped alike")
            if leaf.dtype != first[path].dtype:
                dtypes = f"{leaf.dtype} in {word} {index} and {first[path].dtype} in {word} 0"
                raise TypeError(f"leaf '{path}' has dtype {dtypes}; all {word}s of an ensemble have the same dtypes")


def count_members(flat: Leaves) -> int:
    """The common length of the leading axes.

    Args:
        flat: leaves by path.

    Returns:
        The number of members; 0 if there is no leaf.

    Raises:
        ValueError: a leaf has no leading axis, or one of another length.
    """
    sizes = {path: leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for path, leaf in flat.items()}
    first = next(iter(sizes.values()), 0)
    for path, size in sizes.items():
        if size is None or size != first:
            raise ValueError(
                f"leaf '{path}' has {'no' if size is None else size} members, the first leaf {first}; the leaves of an "
                "ensemble are tensors with a common leading axis"
            )
    return first or 0


def _whole(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):  # NumPy's are integers too
        raise TypeError(f"seeds holds {seed!r}; every seed is an integer")
    return int(seed)


def check_whole(name: str, value: int) -> None:
    """Refuses what is no number of members.

    Args:
        name: of the argument, for the message.
        value: what was given.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; give a number of members, an integer of at least 1")
    if value < 1:
        raise ValueError(f"{name} is {value}; give a number of members, at least 1")


def _check_statistics(model: nn.Module) -> None:
    tracking = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if getattr(module, "track_running_stats", False)
    ]
    if tracking:
        raise ValueError(
            f"layers {', '.join(tracking)} keep running statistics (track_running_stats=True), which vmap cannot "
            "update in place; call torch.func.replace_all_batch_norm_modules_(model) in make_model"
        )
