"""One safetensors file that is written whole or not at all, and whose every bit is checked when it is read.

The file is written beside its target, flushed to the disk and renamed over it, so that at each moment the path holds
the last checkpoint or the new one. safetensors' own writer leaves files of unknown names when it is killed, orders the
metadata at random and reports a full disk without the error's number; the format is simple enough to be written here:
the length of a header, the header in JSON, the tensors. safetensors reads them.

The checksum is the SHA-256 of the whole file with zeros in its place; it takes less time than the writing.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from torch import Tensor

from biofunc.checkpoint_layout import DTYPES
from biofunc.trees import Leaves

CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
ZEROS = b"0" * 64
LONGEST_HEADER = 100_000_000
"""safetensors reads none that is longer."""

_writing: set[str] = set()
"""Names of the files that this process is writing: others that bear its number are left from one that is gone."""


def safetensors() -> Any:
    """The module `safetensors.torch`."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "checkpoints need safetensors, which is not installed: pip install '.[io]' in the checkout",
            name="safetensors",
        ) from None
    return safetensors.torch


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file and renames it over the path.

    Args:
        path: where it will be; a link is followed.
        tensors: by name, of dtypes that safetensors knows.
        metadata: strings by name.

    Raises:
        OSError: it could not be written; what was there before is as it was.
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    if sys.byteorder == "big":
        raise OSError(errno.ENOTSUP, "cannot save, checkpoints are little-endian and this machine is not", path)
    check_folder(folder)
    if os.path.isdir(path):
        raise OSError(errno.EISDIR, "cannot save, this is a folder; give the path of a file", path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EEXIST, "cannot save, this is not a regular file; give another path", path)
    try:
        with temporary(path) as name:
            with open(name, "xb") as file:
                _fill(file, tensors, metadata)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
    except OSError as error:
        reason = f"cannot save ({error.strerror}); what was there before is as it was"
        raise OSError(error.errno, reason, path) from error
    try:
        sync_folder(folder)
    except OSError as error:
        raise OSError(error.errno, f"saved, but a power cut may undo it ({error.strerror})", path) from error


def check_folder(folder: str) -> None:
    """Refuses a folder that is not there.

    Args:
        folder: its path.

    Raises:
        OSError: it is missing, no folder, or out of reach.
    """
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise OSError(error.errno, f"cannot save ({error.strerror}); make the folder first", folder) from None
    if not stat.S_ISDIR(mode):
        raise OSError(errno.ENOTDIR, "cannot save, this is no folder; give another path", folder)


@contextlib.contextmanager
def temporary(path: str) -> Iterator[str]:
    """A free name beside the path; what bears it is removed in the end, and what dead processes left there too."""
    folder, base = os.path.split(path)
    name = f".{base}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    _writing.add(name)
    try:
        with contextlib.suppress(OSError):
            for other in os.listdir(folder):
                if _is_left_over(other, base):
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(folder, other))
        yield os.path.join(folder, name)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, name))
        _writing.discard(name)


def _is_left_over(name: str, base: str) -> bool:
    found = re.fullmatch(rf"\.{re.escape(base)}\.(\d{{1,9}})-[0-9a-f]{{8}}\.tmp", name)
    if not found or name in _writing or os.name == "nt":  # there, signal 0 is none that only asks
        return False
    process = int(found[1])
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def sync_folder(folder: str) -> None:
    """Makes renames in a folder outlive a power cut, where folders can be opened.

    Args:
        folder: its path.

    Raises:
        OSError: it cannot be flushed.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fill(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # The largest numbers first, so that each tensor starts at a multiple of their size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": ZEROS.decode()}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"the layout takes {len(text)} bytes, more than safetensors reads; save fewer leaves")
    place = text.index(ZEROS, text.index(b'"sha256"'))
    start = len(text).to_bytes(8, "little") + text
    file.write(start)
    digest = hashlib.sha256(start)
    for _, tensor in ordered:
        values = bytes_of(tensor)
        file.write(values)
        digest.update(values)
    file.seek(8 + place)
    file.write(digest.hexdigest().encode())


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor in the order of its indices, as bytes, without a copy where they lie so already."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = values.numel() * values.dtype.itemsize
    if not size:
        return memoryview(b"")
    array = (ctypes.c_char * size).from_address(values.data_ptr())
    array.owner = values  # type: ignore[attr-defined]  # its memory lives as long as the view
    return memoryview(array)


def read(path: str) -> bytes:
    """The bytes of a file.

    Args:
        path: the file.

    Returns:
        All of it.

    Raises:
        OSError: it is missing, no regular file, or cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "cannot load, this is not a regular file", path)
    with open(path, "rb") as file:
        return file.read()


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata of a file, before anything is checked but that they are there.

    Args:
        data: its bytes.

    Returns:
        Strings by name.

    Raises:
        ValueError: it is no safetensors file that `write` wrote.
    """
    if data.startswith(b"PK\x03\x04"):
        raise ValueError("it is a zip archive, as torch.save writes: torch.load(path, weights_only=True) reads those")
    if len(data) < 8:
        raise ValueError(f"it has {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, LONGEST_HEADER):
        raise ValueError("it is cut short, or no safetensors file")
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    except (ValueError, RecursionError, AttributeError):
        raise ValueError("its header is damaged, or it is no safetensors file") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("it is a safetensors file that bf.save did not write: safetensors.torch.load_file reads it")
    return metadata


def tensors_of(data: bytes) -> Leaves:
    """The tensors of a file, if all of its bits are as they were written.

    Args:
        data: its bytes, whose metadata could be read.

    Returns:
        Tensors by name.

    Raises:
        ValueError: the checksum does not hold, or safetensors refuses it.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    found = CHECKSUM.search(data, 8, end)
    if not found:
        raise ValueError("it has no checksum")
    digest = hashlib.sha256(data[: found.start(1)] + ZEROS + data[found.end(1) : end])
    digest.update(memoryview(data)[end:])
    if digest.hexdigest().encode() != found[1]:
        raise ValueError("its checksum does not hold")
    library = safetensors()
    try:
        tensors: Leaves = library.load(data)
    except Exception as error:  # SafetensorError is none of Python's
        raise ValueError(f"safetensors refuses it: {error}") from None
    return tensors
