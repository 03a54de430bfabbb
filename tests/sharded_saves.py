"""Processes that save and load a tree of DTensors together: `python tests/sharded_saves.py`.

One process imports torch and forks the others, so that many groups of them are cheap. Prints what happened as JSON.
"""

import datetime
import json
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import mlp, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import biofunc as bf

LEARN = bf.chain(bf.adam(), bf.descend(lr=0.05))
SECONDS = 60


def full(leaf):
    return leaf.full_tensor() if isinstance(leaf, DTensor) else leaf


def whole(tree):
    return torch.utils._pytree.tree_map(full, tree)


def same(left, right):
    """Equal structure, dtypes and bits."""
    left, right = (torch.utils._pytree.tree_flatten(whole(tree)) for tree in (left, right))
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        assert type(a) is type(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) if isinstance(a, torch.Tensor) else a == b
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
    return True


PLACES = {
    "rows": ((8, 4), torch.float32, Shard(0)),
    "columns": ((8, 4), torch.bfloat16, Shard(1)),
    "copies": ((6,), torch.float64, Replicate()),
    "uneven rows": ((7, 5), torch.float32, Shard(0)),
    "uneven columns": ((3, 7), torch.float32, Shard(1)),
    "one row": ((1, 5), torch.float32, Shard(0)),
    "no row": ((0, 5), torch.float32, Shard(0)),
    "integers": ((9,), torch.int64, Shard(0)),
    "bools": ((5, 2), torch.bool, Shard(0)),
    "scalar": ((), torch.float32, Replicate()),
}


def tree(mesh=None, moved=False):
    """DTensors of all kinds, plain tensors and numbers; moved: other values, otherwise placed."""
    made = {}
    for name, (shape, dtype, place) in PLACES.items():
        tensor = (1000 * values(int(moved), shape, torch.float64, name)).to(dtype)
        if moved and isinstance(place, Shard):
            place = Shard(len(shape) - 1 - place.dim)
        made[name] = tensor if mesh is None else distribute_tensor(tensor, mesh, [place])
    plain = {"key": bf.random.key(1), "step": torch.tensor(7 - moved), "view": torch.ones(3).expand(2, 3)}
    plain["shared"] = plain["view"][0]
    return {"spread": made, "plain": plain, "numbers": (3, 0.5, "x", None)}


def start(mesh=None):
    params = mlp()[0]
    if mesh is not None:
        params = {path: distribute_tensor(w, mesh, [Shard(0)]) for path, w in params.items()}
    rates = {path: 1 + 0.1 * w for path, w in params.items()}
    mean = {path: torch.zeros_like(w) for path, w in params.items()}
    layout = tuple((path, tuple(w.shape)) for path, w in params.items())
    fresh = (("momentum", "mean", 0.0),)
    slots = {"momentum": {"mean": mean}}
    state = bf.BioState(bf.random.key(3), torch.tensor(0), rates, slots=slots, fresh=fresh, layout=layout)
    return {"params": params, "state": state}


def train(run, steps):
    """Momentum with a rate per synapse: elementwise, so that the bits do not depend on who holds which row."""
    for _ in steps:
        params, state = run["params"], run["state"]
        mean = {path: 0.9 * state.slots["momentum"]["mean"][path] + w.sin() for path, w in params.items()}
        params = {path: w - 0.05 * state.plasticity[path] * mean[path] for path, w in params.items()}
        run = {"params": params, "state": state.with_slot("momentum", mean=mean).replace(step=state.step + 1)}
    return run


# --- what the groups of processes do ---


def save_all(mesh, folder):
    bf.save(folder / "tree", tree(mesh), rules=LEARN)
    bf.save(folder / "tree", tree(mesh), rules=LEARN)
    assert same(bf.load(folder / "tree", like=tree(mesh, moved=True), rules=LEARN), tree(mesh))
    if dist.get_rank() == 0:
        bf.save(folder / "plain", tree())


def load_all(mesh, folder):
    like = tree(mesh, moved=True)
    for path in (folder / "tree", folder / "plain"):
        loaded = bf.load(path, like=like)
        assert same(loaded, tree(mesh))
        for name, leaf in loaded["spread"].items():
            assert leaf.placements == like["spread"][name].placements
            assert leaf.to_local().is_contiguous()
    assert same(bf.load(folder / "tree", like=tree(moved=True)), tree())


def train_half(mesh, folder, name):
    bf.save(folder / name, train(start(mesh), range(4)))


def train_on(mesh, folder, name):
    run = train(bf.load(folder / name, like=start(mesh)), range(4, 8))
    assert same(run, train(start(mesh), range(8)))
    assert same(run, bf.load(folder / "expected"))


def refused(kind, text, work):
    with pytest.raises(kind, match=text):
        work()


def fail(mesh, folder):
    rank = dist.get_rank()
    bf.save(folder / "kept", tree(mesh))
    big = {"big": distribute_tensor(torch.ones(200_000), mesh, [Shard(0)])}
    partial_sums = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    other = {**big, "mine": torch.tensor(rank)}
    refused(ValueError, "plain tensors of other values", lambda: bf.save(folder / "kept", other))
    refused(ValueError, "saves another tree", lambda: bf.save(folder / "kept", {**big, f"{rank}": 1}))
    refused(TypeError, "'sums' has placements", lambda: bf.save(folder / "kept", {"sums": partial_sums}))
    # What one process alone cannot save, none of them saves, and none waits for it
    odd = {**big, "odd": object() if rank else 3}
    refused(TypeError, "'odd' is object", lambda: bf.save(folder / "kept", odd))
    alone = {"sums": partial_sums if rank else big["big"]}
    refused(TypeError, "'sums' has placements", lambda: bf.save(folder / "kept", alone))
    local = big["big"].to_local().to(torch.complex64)
    twisted = {"twisted": DTensor.from_local(local.conj() if rank else local, mesh, [Shard(0)])}
    refused(TypeError, "call resolve_conj", lambda: bf.save(folder / "kept", twisted))
    refused(FileNotFoundError, "make the folder first", lambda: bf.save(folder / "no" / "folder", big))
    refused(ValueError, "'big' is in like and not", lambda: bf.load(folder / "kept", like={**tree(mesh), **big}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    refused(OSError, "cannot save", lambda: bf.save(folder / "kept", big))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert len(os.listdir(folder / "kept")) == 2, os.listdir(folder / "kept")
    assert same(bf.load(folder / "kept", like=tree(mesh, moved=True)), tree(mesh))


def save_for_ever(mesh, folder):
    for index in range(10_000):
        w = distribute_tensor(torch.full((20_000,), float(index)), mesh, [Shard(0)])
        bf.save(folder / "killed", {"w": w, "at": index})


def load_beside(path, seconds):
    """Loads again and again while others save; parts are removed under its hands."""
    loads, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        run = bf.load(path)
        assert torch.equal(run["w"], torch.full((20_000,), float(run["at"])))
        loads += 1
    return loads


def processes(count, work, folder):
    """Forks processes that do something as a group."""
    store = tempfile.mktemp(dir=folder)
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            limit = datetime.timedelta(seconds=SECONDS)
            dist.init_process_group("gloo", f"file://{store}", limit, world_size=count, rank=rank)
            work(init_device_mesh("cpu", (count,)), folder)
            dist.barrier()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return children


def wait(children):
    """Waits for all; kills them if one fails or time is over."""
    ends, deadline = {}, time.monotonic() + 2 * SECONDS
    while len(ends) < len(children) and time.monotonic() < deadline and not any(ends.values()):
        for child in [child for child in children if child not in ends]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                ends[child] = status
        time.sleep(0.01)
    kill(child for child in children if child not in ends)
    assert list(ends.values()) == [0] * len(children), ends


def kill(children):
    for child in list(children):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def main():
    torch.set_num_threads(1)
    counts = {"groups": 0, "loads beside saves": 0, "kills": 0, "whole after a kill": 0, "parts left by a kill": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def group(count, work):
            wait(processes(count, work, folder))
            counts["groups"] += 1

        group(2, save_all)
        for count in (1, 2, 4):
            group(count, load_all)
        assert same(bf.load(folder / "tree", rules=LEARN), tree())  # outside any group
        bf.save(folder / "expected", train(start(), range(8)))
        for first, second in ((1, 2), (2, 1), (2, 4)):
            group(first, partial(train_half, name=f"run{first}{second}"))
            group(second, partial(train_on, name=f"run{first}{second}"))
        group(2, fail)
        chance = random.Random(0)
        for _ in range(6):
            children = processes(2, save_for_ever, folder)
            deadline = time.monotonic() + SECONDS
            while not (folder / "killed" / "index.safetensors").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            try:
                counts["loads beside saves"] += load_beside(folder / "killed", 0.5)
                time.sleep(chance.uniform(0, 0.3))
            finally:
                chance.shuffle(children)
                kill(children)
            counts["kills"] += 1
            counts["parts left by a kill"] += len(list((folder / "killed").glob("tensors-*"))) > 1
            run = bf.load(folder / "killed")
            counts["whole after a kill"] += torch.equal(run["w"], torch.full((20_000,), float(run["at"])))
        group(1, lambda mesh, folder: bf.save(folder / "killed", tree(mesh)))
        assert len(os.listdir(folder / "killed")) == 2, os.listdir(folder / "killed")
    return counts


if __name__ == "__main__":
    print(json.dumps(main()))
    sys.stdout.flush()
