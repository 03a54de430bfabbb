"""Ensembles spread over the ranks of `torch.distributed`: any number of ranks gives the numbers of one process.

Members never meet, so ranks need not talk while they train. `shard` hands each rank whole chunks, composed as `split`
composes them: a kernel sees the same shapes wherever it runs, and a member gets the same bits. `gather` puts the
ensemble together again. It moves bytes, and what it says about trees is JSON: no pickle goes over the network.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from biofunc import ensemble, trees  # ensemble imports this file: its names are there when a function is called
from biofunc.described import build, describe, unbuildable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["gather", "shard"]

T = TypeVar("T")
Report = dict[str, Any]

PIECE = 2**28
"""Bytes sent at once: bounds what a copy to the device of the process group takes."""


def shard(tree: T, size: int, mesh: "DeviceMesh") -> list[T]:
    """Takes this rank's chunks out of a stacked tree.

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        chunks = bf.ensemble.shard((params, state), 64, mesh)
        ...  # train each chunk, as after `split`
        params, state = bf.ensemble.gather(chunks, 1000, mesh)

    The chunks of all ranks, in the order of ranks, are those of `split(tree, size)`; ranks have equally many chunks or
    one more. No rank waits for another: where the tree is large, shard the seeds and initialise each chunk by itself.

    Args:
        tree: a tree of tensors with a common leading member axis, the same on every rank.
        size: members per chunk, >= 1, the same on every rank.
        mesh: a one-dimensional mesh of ranks; of a larger mesh, the dimension over which members are spread:
            `mesh["members"]`.

    Returns:
        The chunks, as contiguous copies; an empty list on ranks for which there is none.

    Raises:
        TypeError: size is not an integer, or mesh is no mesh.
        ValueError: size below 1, no members, leaves without a common leading axis, or a mesh of several dimensions or
            without this rank.
        RuntimeError: there is no process group.
    """
    _check_mesh(mesh)
    ensemble.check_whole("size", size)
    flat, structure = trees.flatten(tree)
    members = ensemble.count_members(flat)
    if not members:
        raise ValueError("tree has no members; shard takes at least one")
    start, stop = _members_of_ranks(members, size, mesh.size())[mesh.get_local_rank()]
    if start == stop:
        return []
    own: T = trees.unflatten(structure, {path: leaf[start:stop] for path, leaf in flat.items()})
    return ensemble.split(own, size)


@overload
def gather(chunks: Sequence[T], members: int, mesh: "DeviceMesh") -> T: ...


@overload
def gather(chunks: Sequence[T], members: int, mesh: "DeviceMesh", to: int | None = None) -> T | None: ...


@torch.no_grad()
def gather(chunks: Sequence[T], members: int, mesh: "DeviceMesh", to: int | None = None) -> T | None:
    """Puts the chunks of all ranks together: bit for bit what `join` gives in one process.

    Every rank of the mesh calls it, also one that has no chunk. Ranks first tell each other what they hold; where that
    does not fit together, all of them raise. A rank that never calls it keeps the others waiting until it exits, or
    until the timeout of the process group.

    Args:
        chunks: what `shard` gave, or trees made from it chunk by chunk: results, measures, states.
        members: members of the whole ensemble.
        mesh: the mesh that `shard` was given.
        to: the rank of the mesh that gets the whole; default: all ranks, which then need memory for it.

    Returns:
        One tree with a leading member axis, detached; None on ranks that do not get it. Leaves lie on the kind of
        device on which the chunks lie.

    Raises:
        TypeError: members or to is not an integer, mesh is no mesh, or dtypes that differ.
        ValueError: trees or shapes that differ, within a rank or between ranks, leaves without a common leading axis,
            chunks that are not those of so many members, ranks that disagree on members or to, no chunk at all, a tree
            that a rank without a chunk cannot build, or a mesh of several dimensions or without this rank.
        RuntimeError: there is no process group, or a rank is gone.
    """
    _check_mesh(mesh)
    rank, ranks = mesh.get_local_rank(), mesh.size()
    try:
        report, failure = _report(chunks, members, to, ranks), None
    except Exception as error:  # the others wait for this rank's report: they must hear of whatever went wrong
        report, failure = {"error": f"{type(error).__name__}: {error}"}, error
    reports = _exchange(report, mesh)
    if failure is not None:
        raise failure
    size, description = _agreed(reports)
    bounds = _members_of_ranks(members, size, ranks)
    own = [trees.flatten(chunk) for chunk in chunks]
    flat, structure = own[0] if own else trees.flatten(build(description))
    whole: dict[str, Tensor] = {}
    receives = to is None or to == rank
    for path, leaf in flat.items():
        if receives:
            whole[path] = leaf.new_empty((members, *leaf.shape[1:]))
        for owner, (start, stop) in enumerate(bounds):
            if not receives and owner != rank:
                continue
            part = whole[path][start:stop] if receives else leaf.new_empty((stop - start, *leaf.shape[1:]))
            if owner == rank:
                for number, (leaves, _) in enumerate(own):
                    place = part[number * size : (number + 1) * size]
                    place.copy_(leaves[path][: len(place)])
            for piece in _pieces(part, mesh.device_type):
                if to is None:
                    dist.broadcast(piece, group=mesh.get_group(), group_src=owner)
                elif owner != to and rank == owner:
                    dist.send(piece, group=mesh.get_group(), group_dst=to)
                elif owner != to:
                    dist.recv(piece, group=mesh.get_group(), group_src=owner)
    gathered: T | None = trees.unflatten(structure, whole) if receives else None
    return gathered


def _check_mesh(mesh: "DeviceMesh") -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "there is no process group of torch.distributed; start the program with torchrun, and make mesh by "
            "torch.distributed.device_mesh.init_device_mesh('cpu', (ranks,))"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh is {type(mesh).__name__}; give a DeviceMesh: init_device_mesh('cpu', (ranks,))")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has {mesh.ndim} dimensions, {mesh.mesh_dim_names or 'without names'}; give the one over which "
            "members are spread: mesh['NAME']"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in mesh; the ranks {mesh.mesh.tolist()} call this, no others")


def _members_of_ranks(members: int, size: int, ranks: int) -> list[tuple[int, int]]:
    """First member of each rank and the one behind its last: whole chunks, shares differ by one chunk at most."""
    share, more = divmod(-(-members // size), ranks)
    chunks = [rank * share + min(rank, more) for rank in range(ranks + 1)]
    firsts = [min(chunk * size, members) for chunk in chunks]
    return list(pairwise(firsts))


# --- What ranks tell each other before they send anything ---


def _report(chunks: Sequence[Any], members: int, to: int | None, ranks: int) -> Report:
    ensemble.check_whole("members", members)
    if not isinstance(chunks, Sequence):
        raise TypeError(f"chunks is {type(chunks).__name__}; give the list that shard gave, or one made from it")
    if to is not None and (isinstance(to, bool) or not isinstance(to, int)):
        raise TypeError(f"to is {to!r}; give a rank of the mesh, or None for all of them")
    if to is not None and not 0 <= to < ranks:
        raise ValueError(f"to is {to}; it must be a rank of the mesh, 0 to {ranks - 1}")
    flat = [trees.flatten(chunk) for chunk in chunks]
    for leaves, _ in flat:
        ensemble.count_members(leaves)
    if flat:
        ensemble.check_alike(flat, "chunk")
    return {
        "members": members,
        "to": to,
        "chunks": len(chunks),
        "tree": describe(chunks[0]) if chunks else None,
        "leaves": {path: describe(leaf)[1:] for path, leaf in flat[0][0].items()} if chunks else None,
    }


def _exchange(report: Report, mesh: "DeviceMesh") -> list[Report]:
    """The reports of all ranks; as no message depends on what a rank holds, this cannot hang on it."""
    text = torch.tensor(list(json.dumps(report).encode()), dtype=torch.uint8, device=mesh.device_type)
    lengths = [torch.zeros(1, dtype=torch.int64, device=mesh.device_type) for _ in range(mesh.size())]
    dist.all_gather(lengths, torch.tensor([len(text)], device=mesh.device_type), group=mesh.get_group())
    longest = int(max(lengths))
    texts = [text.new_empty(longest) for _ in lengths]
    dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))), group=mesh.get_group())
    return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]


def _agreed(reports: list[Report]) -> tuple[int, Any]:
    """Size of chunks and description of their tree; the same error on every rank if reports do not fit together."""
    for rank, report in enumerate(reports):
        if "error" in report:
            raise ValueError(f"rank {rank} has nothing to gather: {report['error']}")
    for rank, report in enumerate(reports):
        for name in ("members", "to"):
            if report[name] != reports[0][name]:
                raise ValueError(
                    f"{name} is {report[name]} on rank {rank} and {reports[0][name]} on rank 0; all ranks give the same"
                )
    holders = [rank for rank, report in enumerate(reports) if report["chunks"]]
    if not holders:
        raise ValueError("chunks is empty on every rank; hand over what shard gave")
    first = reports[holders[0]]
    for rank in holders:
        _check_leaves(reports[rank], first, f"rank {rank}", f"rank {holders[0]}")
    if not first["leaves"]:
        raise ValueError("chunks hold no leaves; hand over trees with at least one tensor")
    members, size = first["members"], next(iter(first["leaves"].values()))[1][0]
    if size < 1:
        raise ValueError("chunks have no members; hand over what shard gave")
    for rank, (start, stop) in enumerate(_members_of_ranks(members, size, len(reports))):
        held, due = reports[rank]["chunks"], -(-(stop - start) // size)
        if held != due:
            raise ValueError(
                f"rank {rank} holds {held} chunks of {size}, but of {members} members {due} chunks are its own; hand "
                "over every chunk that shard gave, and the number of members that were sharded"
            )
    missing = unbuildable(first["tree"])
    receivers = range(len(reports)) if first["to"] is None else [first["to"]]
    empty = [rank for rank in receivers if rank not in holders]
    if missing and empty:
        raise ValueError(
            f"rank {empty[0]} has no chunk and cannot build {missing}; use smaller chunks or fewer ranks, or gather "
            "dicts, lists, tuples and BioStates"
        )
    return size, first["tree"]


def _check_leaves(report: Report, other: Report, here: str, there: str) -> None:
    for path in [*report["leaves"], *other["leaves"]]:
        found = [held["leaves"].get(path) for held in (report, other)]
        if found[0] != found[1]:
            left, right = ["nothing" if leaf is None else f"{leaf[0]} {tuple(leaf[1])} on {leaf[2]}" for leaf in found]
            raise ValueError(f"leaf '{path}' is {left} on {here} and {right} on {there}; all ranks have chunks alike")
    if report["tree"] != other["tree"]:
        raise ValueError(f"chunks on {here} are trees of another structure than on {there}; all ranks have them alike")


def _pieces(part: Tensor, device: str) -> Iterator[Tensor]:
    """The bytes of a tensor piece by piece, where the process group can move them, and back again afterwards."""
    if not part.numel():
        return
    flat = part.view(-1).view(torch.uint8)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        if piece.device.type == device:
            yield piece
        else:
            staged = piece.to(device)
            yield staged
            piece.copy_(staged)
