"""Checkpoints of trees that are spread over processes: a folder in which each process writes its own part.

The folder holds `index.safetensors`, a checkpoint without tensors that names the folder with the parts and the checksum
of each file in it, and that folder, written by torch.distributed.checkpoint as safetensors files. The index alone says
what is current: it is renamed over the one before when all parts are on the disk, and older parts are removed then.
`checkpoint_parts` reads them.
"""

import errno
import hashlib
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from biofunc import checkpoint_file
from biofunc.checkpoint_layout import at
from biofunc.checkpoint_parts import PARTS, checksum, of_system
from biofunc.sharding import is_sharded
from biofunc.trees import Leaves

INDEX = "index.safetensors"


def check_placements(tensors: Mapping[str, Tensor]) -> None:
    """Refuses DTensors of which no rectangle of the whole is here.

    Args:
        tensors: by path.

    Raises:
        TypeError: a placement is neither Shard nor Replicate.
    """
    for path, tensor in tensors.items():
        if isinstance(tensor, DTensor) and not all(type(p) in (Shard, Replicate) for p in tensor.placements):
            raise TypeError(
                f"{at(path)} has placements {tensor.placements}; a checkpoint holds those of Shard and Replicate: "
                "redistribute it first"
            )


def distributed(saved: Tensor, like: DTensor, path: str) -> Tensor:
    """A tensor of a checkpoint as a DTensor.

    Args:
        saved: its values, or shape and dtype on the meta device.
        like: has the placements.
        path: where it stands, for messages.

    Returns:
        The DTensor, yet to be filled where the values are not there.

    Raises:
        TypeError: the placements are neither Shard nor Replicate.
    """
    check_placements({path: like})
    if saved.is_meta:
        return torch.empty_like(like.detach(), memory_format=torch.contiguous_format)
    return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def write(path: str, described: Callable[[], tuple[Leaves, dict[str, str]]]) -> None:
    """Writes a tree; each process of the default group calls it with the same one.

    Args:
        path: the folder; it is made if it is missing.
        described: gives the tensors by name, DTensors and tensors that are the same on all processes, and metadata as
            for a checkpoint in one file. Where it raises on one process, all of them raise.

    Raises:
        TypeError: a placement of a DTensor cannot be saved.
        ValueError: the processes do not agree about the tree; nothing was written then.
        OSError: a part could not be written; what was there before is as it was.
    """
    path = os.path.realpath(path)
    tensors: Leaves = {}
    metadata: dict[str, str] = {}

    def describe() -> tuple[str, str]:
        found, texts = described()
        check_placements(found)
        tensors.update(found)
        metadata.update(texts)
        return _summary(found, texts), secrets.token_hex(8)

    first, *others = _together(describe)
    for rank, (digest, _) in enumerate(others, 1):
        if digest != first[0]:
            raise ValueError(
                f"process {rank} saves another tree or other rules than process 0, or plain tensors of other values; "
                "only DTensors differ between processes"
            )
    parts = f"tensors-{first[1]}"
    try:
        _together(lambda: _make_folders(path, parts))
        taken: set[int] = set()
        own: Leaves = {}
        _together(lambda: own.update({name: _separate(tensor, taken) for name, tensor in tensors.items()}))
        files = _together(lambda: _write_part(os.path.join(path, parts), own))
        checksums = {name: digest for part in files for name, digest in part}
        index = {**metadata, "parts": parts, "files": json.dumps(checksums)}

        def commit() -> None:
            if dist.get_rank() == 0:
                checkpoint_file.sync_folder(os.path.join(path, parts))
                checkpoint_file.write(os.path.join(path, INDEX), {}, index)

        _together(commit)
    except BaseException:
        if dist.get_rank() == 0 and not _is_current(path, parts):
            shutil.rmtree(os.path.join(path, parts), ignore_errors=True)
        raise
    if dist.get_rank() == 0:
        for other in _listed(path):
            if PARTS.fullmatch(other) and other != parts:
                shutil.rmtree(os.path.join(path, other), ignore_errors=True)


def _listed(folder: str) -> list[str]:
    """What lies in a folder; nothing where that cannot be told, for who cannot look removes nothing."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _summary(tensors: Leaves, metadata: Mapping[str, str]) -> str:
    """Checksum of all that must be the same on each process."""
    summary = hashlib.sha256(json.dumps(metadata).encode())
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            summary.update(name.encode() + checkpoint_file.bytes_of(tensor))
    return summary.hexdigest()


def _is_current(path: str, parts: str) -> bool:
    """Whether the index names these parts already: another process may fail after it was renamed."""
    try:
        with open(os.path.join(path, INDEX), "rb") as file:
            return parts.encode() in file.read()
    except FileNotFoundError:
        return False
    except OSError:  # who cannot look removes nothing
        return True


def _make_folders(path: str, parts: str) -> None:
    if dist.get_rank() == 0:
        checkpoint_file.check_folder(os.path.dirname(path))
        if os.path.exists(path) and not os.path.isdir(path):
            raise OSError(errno.ENOTDIR, "cannot save, a tree with DTensors takes a folder and this is a file", path)
        os.makedirs(os.path.join(path, parts))


def _write_part(folder: str, tensors: Leaves) -> list[tuple[str, str]]:
    """Writes what falls to this process; names and checksums of its files."""
    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    except CheckpointException as error:
        raise of_system(error, "cannot save ({}); what was there before is as it was", folder) from None
    mine = f"shard-{dist.get_rank() + 1:05d}-"
    names = [name for name in sorted(os.listdir(folder)) if name.startswith(mine)]
    return [(name, checksum(os.path.join(folder, name))) for name in names]


def _separate(tensor: Tensor, taken: set[int]) -> Tensor:
    """The tensor, contiguous and in memory that it does not share with one before: safetensors wants it so."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    storage = local.untyped_storage().data_ptr()
    if local.is_conj():
        raise TypeError("a conjugated view cannot be saved with DTensors; call resolve_conj() first")
    if not local.is_contiguous() or local.is_neg() or storage in taken:
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    taken.add(storage)
    return tensor.detach()


def _together(work: Callable[[], Any]) -> list[Any]:
    """Does something on each process; all get the results of all, or raise where one of them failed."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # the others wait: they must hear of whatever went wrong
        failure = error
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, None if failure is None else _portable(failure)))
    if failure is not None:
        raise failure
    for _, other in outcomes:
        if other is not None:
            raise other
    return [result for result, _ in outcomes]


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it would not survive the way to other processes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle raises all kinds
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
