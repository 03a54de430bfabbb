"""Leaves that several processes share: DTensors, as FSDP2 and tensor parallelism make them.

Rules run on DTensors as they are, so that their means and maxima are those of the whole leaf. What torch cannot do with
DTensors is done here, on the part of a leaf that a process holds: noise, statistics, and the placement of results. This
file alone knows DTensors; torch loads them, which takes seconds, when the first one is made.
"""

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from biofunc.parts import Part

Pieces = tuple[tuple[int, int], ...]
"""Indices of an axis, as ranges `(from, to)`."""


def is_sharded(leaf: Any) -> bool:
    """Whether a tensor is a DTensor, also one that each process holds whole."""
    if type(leaf) is Tensor or type(leaf) is nn.Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(leaf, DTensor)


def part_of(leaf: Tensor) -> Part:
    """The part of a leaf that this process holds: all of a plain tensor."""
    if not is_sharded(leaf):
        check_unwrapped(leaf)
        return Part(tuple(leaf.shape), leaf.numel())
    given: Any = leaf
    arguments = (tuple(leaf.shape), given.device_mesh, tuple(given.placements), leaf.device)
    return _part(*arguments) if torch.compiler.is_compiling() else _cached_part(*arguments)


def check_unwrapped(leaf: Tensor) -> None:
    """Raises a TypeError for a DTensor that a transformation of torch.func has wrapped: its part is out of reach."""
    if torch.compiler.is_compiling():
        return
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(leaf):
        leaf = functorch.get_unwrapped(leaf)
        if is_sharded(leaf):
            raise TypeError(
                "noise was asked for a DTensor inside grad or vmap of torch.func; take the gradients first and call "
                "the rules outside, or vmap over local tensors"
            )


def _part(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], device: torch.device) -> Part:
    pieces = [_pieces(shape, axis, mesh, placements) for axis in range(len(shape))]
    sizes = tuple([_count(cut) for cut in pieces])
    if 0 in sizes:
        return Part(sizes, 0)
    cut = [axis for axis, size in enumerate(sizes) if size < shape[axis]]
    if not cut:
        return Part(sizes, math.prod(sizes))
    # Behind the last axis that is cut, all elements are consecutive
    last = cut[-1]
    behind = math.prod(shape[last + 1 :])
    if len(pieces[last]) == 1:
        length, pieces[last] = sizes[last] * behind, ((pieces[last][0][0], pieces[last][0][0] + 1),)
    else:
        length = behind
    if all(_count(pieces[axis]) == 1 for axis in range(last + 1)):
        return Part(sizes, length, sum(pieces[axis][0][0] * math.prod(shape[axis + 1 :]) for axis in range(last + 1)))
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    for axis in range(last + 1):
        index = torch.cat([torch.arange(low, high, device=device) for low, high in pieces[axis]])
        starts = (starts.unsqueeze(-1) + index * math.prod(shape[axis + 1 :])).flatten()
    return Part(sizes, length, starts=starts)


_cached_part = functools.lru_cache(maxsize=1024)(_part)


def _pieces(shape: Sequence[int], axis: int, mesh: Any, placements: Sequence[Any]) -> Pieces:
    """The indices along one axis that this process holds, in the order in which it holds them."""
    pieces: Pieces = ((0, shape[axis]),)
    for mesh_axis, placement in enumerate(placements):
        if not cuts(placement, axis):
            continue
        count, place = mesh.size(mesh_axis), mesh.get_local_rank(mesh_axis)
        # FSDP on top of tensor parallelism: a cut that counts as made after those further right
        strided = getattr(placement, "split_factor", 1)
        pieces = sum([_chunk(_chunk(pieces, strided, i), count, place) for i in range(strided)], ())
    return pieces


def _chunk(pieces: Pieces, count: int, place: int) -> Pieces:
    """One of so many chunks, as torch.chunk cuts them."""
    size = -(-_count(pieces) // count)
    begin, end, position = size * place, size * (place + 1), 0
    chosen = []
    for low, high in pieces:
        first, last = max(begin - position, 0), min(end - position, high - low)
        if first < last:
            chosen.append((low + first, low + last))
        position += high - low
    return tuple(chosen)


def _count(pieces: Pieces) -> int:
    return sum([high - low for low, high in pieces])


def cuts(placement: Any, axis: int) -> bool:
    """Whether a placement cuts an axis; FSDP2's strided one is no subclass of the plain one."""
    return getattr(placement, "dim", None) == axis and not placement.is_replicate()


def assembled(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor, placed like another, of which this process holds a part; a plain tensor as it is."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    given: Any = like
    stride = tuple([math.prod(like.shape[axis + 1 :]) for axis in range(like.dim())])
    made: Tensor = DTensor.from_local(
        local, given.device_mesh, given.placements, run_check=False, shape=like.shape, stride=stride
    )
    return made


def local(leaf: Tensor) -> Tensor:
    """What this process holds of a leaf."""
    given: Any = leaf
    held: Tensor = given.to_local() if is_sharded(leaf) else leaf
    return held


def whole(leaf: Tensor) -> Tensor:
    """A leaf as a plain tensor, gathered from all processes."""
    given: Any = leaf
    gathered: Tensor = given.full_tensor() if is_sharded(leaf) else leaf
    return gathered


def combined(value: Tensor, like: Tensor, operation: str = "sum") -> Tensor:
    """A statistic of a whole leaf out of those of the parts, as a plain tensor: "sum", "max" or "min"."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    given: Any = like
    placements = [Replicate() if p.is_replicate() else Partial(operation) for p in given.placements]
    total: Tensor = DTensor.from_local(value, given.device_mesh, placements, run_check=False).full_tensor()
    return total


def placed(leaf: Tensor, like: Tensor) -> Tensor:
    """A tensor placed like a DTensor of its shape; of a plain one, the same on all processes, each takes its part."""
    if not is_sharded(like):
        return leaf
    given: Any = like
    return _placed(leaf, given.device_mesh, given.placements)


def per_neuron(values: Tensor, weight: Tensor) -> Tensor:
    """One value per neuron `(neurons,)`, placed like the first axis of a weight."""
    if not is_sharded(weight):
        return whole(values)
    from torch.distributed.tensor import Replicate

    given: Any = weight
    return _placed(values, given.device_mesh, [p if cuts(p, 0) else Replicate() for p in given.placements])


def _placed(leaf: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import DTensor

    given: Any = leaf
    if is_sharded(leaf):
        if given.device_mesh == mesh and tuple(given.placements) == tuple(placements):
            return leaf
        moved: Tensor = given.redistribute(mesh, placements)
        return moved
    for axis in range(leaf.dim()):
        pieces = _pieces(leaf.shape, axis, mesh, placements)
        held = [given.narrow(axis, low, high - low) for low, high in pieces or ((0, 0),)]
        given = held[0] if len(held) == 1 else torch.cat(held, axis)
    stride = tuple([math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.dim())])
    given = given.contiguous()
    made: Tensor = DTensor.from_local(given, mesh, placements, run_check=False, shape=leaf.shape, stride=stride)
    return made


def settled(leaf: Tensor) -> Tensor:
    """A DTensor whose partial sums are added up."""
    given: Any = leaf
    if not is_sharded(leaf) or not any(p.is_partial() for p in given.placements):
        return leaf
    from torch.distributed.tensor import Replicate

    added: Tensor = given.redistribute(placements=[Replicate() if p.is_partial() else p for p in given.placements])
    return added


def replicated(leaf: Tensor) -> Tensor:
    """A DTensor that every process holds whole; a plain tensor as it is."""
    if not is_sharded(leaf):
        return leaf
    from torch.distributed.tensor import Replicate

    given: Any = leaf
    copied: Tensor = given.redistribute(placements=[Replicate()] * len(given.placements))
    return copied


def check_placement(path: str, leaf: Tensor) -> None:
    """Raises a ValueError for parameters that are sums still to be made."""
    given: Any = leaf
    if is_sharded(leaf) and any(p.is_partial() for p in given.placements):
        raise ValueError(
            f"params leaf '{path}' is a DTensor with placements {tuple(given.placements)}, a sum that is still to be "
            "made; redistribute it to Shard or Replicate"
        )


def aligned(name: str, path: str, leaf: Tensor, weight: Tensor) -> Tensor:
    """A gradient placed like its parameter: autograd leaves some as partial sums or with other placements."""
    if is_sharded(leaf) != is_sharded(weight):
        kinds = ["a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (leaf, weight)]
        raise TypeError(f"{name} leaf '{path}' is {kinds[0]}, the parameter {kinds[1]}; shard both alike, or neither")
    if not is_sharded(weight):
        return leaf
    given: Any = (leaf, weight)
    if given[0].device_mesh != given[1].device_mesh:
        raise ValueError(
            f"{name} leaf '{path}' lies on the mesh {given[0].device_mesh}, the parameter on {given[1].device_mesh}; "
            "take the gradients of the parameters that you hand over"
        )
    return placed(leaf, weight)


def check_module(name: str, model: nn.Module) -> None:
    """Raises a TypeError for a module that FSDP has wrapped: `functional_call` ignores what is handed to it."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for path, module in model.named_modules():
        if isinstance(module, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            place = f"layer '{path}' of the model" if path else "the model"
            raise TypeError(
                f"{name}: {place} is wrapped by FSDP, whose hooks put their own parameters in the place of those that "
                "are handed over, without an error; give the module as it was before fully_shard (a copy on the meta "
                "device will do) and hand the DTensors to it, or let the rules act with bf.attach"
            )


def groups(params: Mapping[str, Tensor]) -> list[Any]:
    """The process groups over which parameters are spread, each once."""
    found: dict[int, Any] = {}
    for leaf in params.values():
        if is_sharded(leaf):
            given: Any = leaf
            found.update({id(group): group for group in given.device_mesh.get_all_groups()})
    return list(found.values())
