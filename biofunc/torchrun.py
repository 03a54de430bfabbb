"""Ranks of torchrun, among which the command line shares its work: they meet here, and rank 0 alone tells of it."""

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from tqdm import tqdm

PATIENCE = datetime.timedelta(days=7)
"""How long ranks wait for one that lives and works on; that one has died they hear at once, and torchrun ends them."""


def tell(line: str) -> None:
    """Says how far things are, once.

    Args:
        line: for standard error.
    """
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def rank() -> int:
    """This process's rank under torchrun, else 0."""
    return int(os.environ["RANK"]) if dist.is_available() and dist.is_torchelastic_launched() else 0


@contextlib.contextmanager
def mesh_of_ranks(device: str) -> "Iterator[DeviceMesh | None]":
    """The ranks among which torchrun shares the work; they part together.

    Args:
        device: "cpu" or "cuda", the type alone.

    Returns:
        A context that gives a mesh of all ranks, or None without torchrun.

    Raises:
        ValueError: there are more ranks on this machine than GPUs.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh

    if device == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"argument --device: {count} GPUs are here; give torchrun --nproc-per-node {count}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield init_device_mesh(device, (dist.get_world_size(),))
        dist.barrier()  # a rank that closes its connections while another still reads from them aborts it
    finally:
        dist.destroy_process_group()


def progress_bar(total: int) -> "tqdm":
    """A bar of steps, shown by rank 0 alone.

    Args:
        total: number of steps.

    Returns:
        The bar, open; close it or use it in a `with`.
    """
    from tqdm import tqdm

    return tqdm(total=total, unit="step", disable=rank() > 0)
