"""Reads the parts of a checkpoint that is spread over processes, whole or what one process holds.

Parts hold offsets, so that any number of processes can read them. torch's reader of its own format unpickles, and is
not used.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from biofunc.trees import Leaves

PARTS = re.compile(r"tensors-[0-9a-f]{16}")


def of_system(error: CheckpointException, message: str, folder: str) -> OSError:
    """What went wrong under torch.distributed.checkpoint, as an error of the system.

    Args:
        error: torch's, of one process.
        message: "{}" stands for the cause.
        folder: where it happened.

    Returns:
        The error, to be raised.
    """
    cause = next(iter(error.failures.values()))[0]
    number = cause.errno if isinstance(cause, OSError) else errno.EIO
    return OSError(number, message.format(cause), folder)


def checksum(path: str) -> str:
    """SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        Hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shapes(path: str, metadata: Mapping[str, str]) -> Leaves:
    """What the parts of a checkpoint hold, after a check of every bit.

    Args:
        path: the folder.
        metadata: those of its index.

    Returns:
        Tensors on the meta device by name.

    Raises:
        ValueError: a part is damaged, missing, or there is one too many.
        OSError: a part cannot be read.
    """
    folder = _parts(path, metadata)
    try:
        files = json.loads(metadata.get("files", ""))
        good = isinstance(files, dict) and all([isinstance(digest, str) for digest in files.values()])
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise ValueError("its index does not name the files")
    found = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    for name in sorted(found ^ files.keys()):
        raise ValueError(f"the file {os.path.join(folder, name)} is {'missing' if name in files else 'one too many'}")
    for name, digest in files.items():
        if checksum(os.path.join(folder, name)) != digest:
            raise ValueError(f"the checksum of {os.path.join(folder, name)} does not hold")
    try:
        stored = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
        held = {name: kept for name, kept in stored.items() if isinstance(kept, TensorStorageMetadata)}
        dtypes = {name: kept.properties.dtype for name, kept in held.items()}
        whole = {name: torch.empty(kept.size, dtype=dtypes[name], device="meta") for name, kept in held.items()}
        torn = [name for name, kept in held.items() if not _tiles(kept)]
    except Exception as error:  # on a forged header torch and safetensors raise all kinds
        raise ValueError(f"its parts cannot be read ({type(error).__name__}: {error})") from None
    if torn:
        raise ValueError(f"the parts of tensor '{torn[0]}' do not make a whole")
    return whole


def _tiles(kept: TensorStorageMetadata) -> bool:
    """Whether the parts of a tensor lie within it, apart from each other, and leave nothing out."""
    boxes = [tuple(zip(part.offsets, part.sizes, strict=True)) for part in kept.chunks if math.prod(part.sizes)]
    for box in boxes:
        if not all([start >= 0 and start + size <= whole for (start, size), whole in zip(box, kept.size, strict=True)]):
            return False
    for one, other in itertools.combinations(boxes, 2):
        if all([a < b + m and b < a + n for (a, n), (b, m) in zip(one, other, strict=True)]):
            return False
    return sum([math.prod([size for _, size in box]) for box in boxes]) == math.prod(kept.size)


def fill(path: str, metadata: Mapping[str, str], targets: Leaves) -> None:
    """Reads into tensors, each process what it holds of them, without waiting for the others.

    Args:
        path: the folder.
        metadata: those of its index.
        targets: tensors by name, of the shapes and dtypes that the checkpoint has; they are written into.

    Raises:
        OSError: a part cannot be read.
    """
    if not targets:
        return
    folder = _parts(path, metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(dict(targets), storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
        except CheckpointException as error:
            raise of_system(error, "cannot load ({})", folder) from None


def _parts(path: str, metadata: Mapping[str, str]) -> str:
    if not PARTS.fullmatch(metadata.get("parts", "")):
        raise ValueError("its index does not name the folder of its parts")
    return os.path.join(path, metadata["parts"])
