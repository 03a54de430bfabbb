"""Draws by a compiled kernel: the same bits, many times faster.

In tensor operations the generator is some hundred passes over its words. `philox.cpp` is the same generator as one
loop, behind two custom operators, which `vmap` and `torch.compile` see as a whole: a compiled step then needs no
generator of its own, so that it also compiles faster.
"""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc import philox

__all__ = ["accelerate"]

BITS = {"uniform": 24, "uniform of 11 bits": 11, "uniform of 8 bits": 8, "normal": 0}
"""What the kernel calls the kinds of `philox.CONVERSIONS`."""

FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
"""From fast to plain: some compilers know no OpenMP, or not the machine that they run on."""


def accelerate(on: bool = True) -> None:
    """Turns compiled draws on the CPU on or off, for the whole process; no number changes.

    The kernel is compiled at the first call, which takes less than a second. Inside `torch.compile` the operator is
    called as it is, so that the step compiles faster; turn it on before the step is compiled.

    Args:
        on: whether draws on the CPU use the compiled kernel; other devices are not affected.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    if on:
        _kernel()
    philox.ACCELERATED = on


@functools.cache
def _kernel() -> ctypes.CDLL:
    """philox.cpp, compiled for this machine."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    compiler = next((found for name in compilers if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("accelerate needs a C++ compiler; install g++, or draw without")
    source = pathlib.Path(__file__).with_name("philox.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "philox.so"
        for flags in FLAGS:
            command = [compiler, "-std=c++17", "-O3", "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode == 0:
                return ctypes.CDLL(str(library))
    raise RuntimeError(f"accelerate: {compiler} could not compile {source}: {run.stderr.strip()[-500:]}")


def _array(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


torch.library.define("biofunc::draws", "(Tensor keys, int[] starts, int[] counts, str kind) -> Tensor")
torch.library.define("biofunc::derive", "(Tensor keys, Tensor low, Tensor high, int domain) -> Tensor")


@torch.library.impl("biofunc::draws", "cpu")
def _draws(keys: Tensor, starts: list[int], counts: list[int], kind: str) -> Tensor:
    keys, out = keys.contiguous(), torch.empty(*keys.shape[:-2], sum(counts))
    members, leaves = ctypes.c_int64(keys[..., 0, 0].numel()), ctypes.c_int64(len(counts))
    table, threads = _pointer(philox.normal_table(keys.device)), torch.get_num_threads()
    _kernel().biofunc_draws(
        _pointer(keys), members, leaves, _array(starts), _array(counts), BITS[kind], table, _pointer(out), threads
    )
    return out


@torch.library.impl("biofunc::derive", "cpu")
def _derive(keys: Tensor, low: Tensor, high: Tensor, domain: int) -> Tensor:
    keys, low, high = keys.contiguous(), low.contiguous(), high.contiguous()
    out, count = torch.empty_like(keys), ctypes.c_int64(low.numel())
    _kernel().biofunc_derive(
        _pointer(keys), _pointer(low), _pointer(high), ctypes.c_int64(domain), count, _pointer(out)
    )
    return out


def _empty_draws(keys: Tensor, starts: list[int], counts: list[int], kind: str) -> Tensor:
    return keys.new_empty((*keys.shape[:-2], sum(counts)), dtype=torch.float32)


def _empty_keys(keys: Tensor, low: Tensor, high: Tensor, domain: int) -> Tensor:
    return keys.new_empty(keys.shape)


def _front(tensor: Tensor, dim: int | None, members: int) -> Tensor:
    return tensor.expand(members, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _draws_of_members(info: Any, dims: Any, keys: Tensor, starts: list[int], counts: list[int], kind: str) -> Any:
    return torch.ops.biofunc.draws(_front(keys, dims[0], info.batch_size), starts, counts, kind), 0


def _derive_of_members(info: Any, dims: Any, *given: Any) -> Any:
    tensors = [_front(tensor, dim, info.batch_size) for tensor, dim in zip(given[:3], dims[:3], strict=True)]
    return torch.ops.biofunc.derive(*tensors, given[3]), 0


torch.library.register_fake("biofunc::draws", _empty_draws)
torch.library.register_fake("biofunc::derive", _empty_keys)
torch.library.register_vmap("biofunc::draws", _draws_of_members)
torch.library.register_vmap("biofunc::derive", _derive_of_members)
