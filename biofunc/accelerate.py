"""Draws by a compiled kernel: the same bits, many times faster.

In tensor operations the generator is some hundred passes over its words. `philox.cpp` is the same generator as one
loop, behind two custom operators, for draws and for keys. `vmap` sees both as a whole, and `torch.compile` that for
draws, so that a compiled step needs no generator of its own and compiles faster; keys it derives in its own kernels,
where so few words cost nothing.
"""

import ctypes
import functools
import os
import pathlib
import shlex
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

    Each process compiles the kernel at its first call, which takes less than a second. `uniform` in float64,
    `rademacher`, `gamma` and `beta` stay tensor operations. Turn it on before a step is compiled: a change compiles the
    step anew.

    Args:
        on: whether draws on the CPU use the compiled kernel; other devices are not affected.

    Raises:
        TypeError: `on` is no bool.
        RuntimeError: there is no C++ compiler (CXX, else g++, clang++ or c++), it fails, or what it made cannot be
            loaded.
    """
    if not isinstance(on, bool):
        raise TypeError(f"on is {on!r}; it must be True or False")
    if on:
        _kernel()
    philox.ACCELERATED = on


@functools.cache
def _kernel() -> ctypes.CDLL:
    """philox.cpp, compiled for this machine."""
    compiler = _compiler()
    source = pathlib.Path(__file__).with_name("philox.cpp")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, flags in enumerate(FLAGS):
            library = pathlib.Path(folder) / f"philox{number}.so"
            command = [*compiler, "-std=c++17", "-O3", "-shared", "-fPIC", *flags, str(source), "-o", str(library)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            said = run.stderr.strip()[-500:]
            if run.returncode == 0:
                try:
                    return ctypes.CDLL(str(library))
                except OSError as error:
                    said = f"{error}; TMPDIR must name a folder from which programs may run"
    raise RuntimeError(f"accelerate: {' '.join(compiler)} could not compile {source}: {said}")


def _compiler() -> list[str]:
    given = shlex.split(os.environ.get("CXX", ""))
    found = [path for name in (given[:1] or ("g++", "clang++", "c++")) if (path := shutil.which(name))]
    if not found:
        raise RuntimeError(
            f"accelerate needs a C++ compiler; CXX names '{given[0]}', which is not there"
            if given
            else "accelerate needs a C++ compiler; install g++, or draw without"
        )
    return [found[0], *given[1:]]


def _array(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


torch.library.define("biofunc::draws", "(Tensor keys, SymInt[] starts, SymInt[] counts, str kind) -> Tensor")
torch.library.define("biofunc::derive", "(Tensor keys, Tensor low, Tensor high, int domain) -> Tensor")


def _empty_draws(keys: Tensor, starts: list[int], counts: list[int], kind: str) -> Tensor:
    return keys.new_empty((*keys.shape[:-2], sum(counts)), dtype=torch.float32)


@torch.library.impl("biofunc::draws", "cpu")
def _draws(keys: Tensor, starts: list[int], counts: list[int], kind: str) -> Tensor:
    out = _empty_draws(keys, starts, counts, kind)
    keys = keys.contiguous()
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
