"""Ensembles over ranks: the numbers of one process, bit for bit, and no rank waits for ever."""

import datetime
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import datasets
from biofunc.__main__ import main
from biofunc.compare import CHUNK
from biofunc.described import build, describe, unbuildable
from biofunc.sharded_ensemble import _members_of_ranks

ROOT = pathlib.Path(__file__).parent.parent
CASES = [(10, 3), (3, 4), (8, 2), (1, 1)]
"""Members and size: they do not divide, one chunk for all ranks, one for each of four, a single member."""


# --- A training run, in chunks ---


def make_model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


MODEL = nn.Sequential(nn.Linear(4, 5, device="meta"), nn.Tanh(), nn.Linear(5, 3, device="meta"))
LEARN = bf.chain(
    bf.crystallize,
    bf.adam(),
    bf.volume_dependent_lr,
    bf.fuzzy_learning_rates,
    bf.descend(0.1),
    bf.every(2, partial(bf.rejuvenate_weights, rate=0.2)),
)


def step(params, state, x):
    grads = grad(lambda p: functional_call(MODEL, p, (x,)).square().mean())(params)
    params, _, state = LEARN(params, grads, state)
    return params, state


def trained(seeds, ensemble_step, steps=4):
    """The members of one chunk after some steps, and beside them what takes more than float32 to send."""
    params, _ = bf.ensemble.init(make_model, seeds.tolist())
    state = torch.vmap(LEARN.init)(params, bf.random.key(seeds))
    for i in range(steps):
        params, state = ensemble_step(params, state, torch.linspace(-1, 1, 12).reshape(3, 4) + i)
    odd = torch.complex(seeds.double(), -seeds.double())
    return params, state, [seeds % 2 == 0, odd, params["0.bias"].bfloat16(), torch.empty(len(seeds), 0), None]


def by_rank(function, ranks, *arguments, within=150):
    """Runs `function(rank, *arguments)` in processes of their own; none outlives the call. Returns exit codes."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=function, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + within
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, "a rank hangs"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def start(rank, ranks, folder, seconds=100):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, world_size=ranks, rank=rank)


# --- Any number of ranks gives the numbers of one process ---


def train_on_meshes(rank, folder):
    start(rank, 4, folder)
    meshes = {ranks: DeviceMesh("cpu", list(range(ranks))) for ranks in (1, 2, 3, 4)}  # all ranks make all of them
    for ranks, mesh in meshes.items():
        for members, size in CASES if rank < ranks else []:
            seeds = bf.ensemble.shard(torch.arange(100, 100 + members), size, mesh)
            chunks = [trained(chunk, torch.vmap(step, in_dims=(0, 0, None))) for chunk in seeds]
            whole = bf.ensemble.gather(chunks, members, mesh)
            last = bf.ensemble.gather(chunks, members, mesh, to=ranks - 1)
            torch.save((seeds, whole, last), f"{folder}/{ranks}-{members}-{rank}.pt")
    row = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "members"))["members"]
    chunks = bf.ensemble.shard({"seeds": torch.arange(5) + 10 * (rank // 2)}, 2, row)
    torch.save(bf.ensemble.gather(chunks, 5, row), f"{folder}/row-{rank}.pt")
    if rank < 2:
        compiled = torch.compile(torch.vmap(step, in_dims=(0, 0, None)), fullgraph=True, backend="aot_eager")
        chunks = [trained(chunk, compiled) for chunk in bf.ensemble.shard(torch.arange(9), 2, meshes[2])]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # one step serves all chunks
        torch.save(bf.ensemble.gather(chunks, 9, meshes[2]), f"{folder}/compiled-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    assert by_rank(train_on_meshes, 4, folder, within=300) == [0] * 4
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize(("members", "size"), CASES)
def test_any_number_of_ranks_gives_the_numbers_of_one_process(on_meshes, members, size):
    alone = bf.ensemble.split(torch.arange(100, 100 + members), size)
    chunks = [trained(chunk, torch.vmap(step, in_dims=(0, 0, None))) for chunk in alone]
    expected = bf.ensemble.join(chunks, members)
    for ranks in (1, 2, 3, 4):
        found = [on_meshes(f"{ranks}-{members}-{rank}") for rank in range(ranks)]
        assert_same([chunk for seeds, _, _ in found for chunk in seeds], alone)
        counts = [len(seeds) for seeds, _, _ in found]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] - counts[-1] <= 1
        for rank, (_, whole, last) in enumerate(found):
            assert_equal(whole, expected)
            if rank == ranks - 1:
                assert_equal(last, expected)
            else:
                assert last is None


def test_a_compiled_step_gives_the_numbers_of_one_process(on_meshes, fresh_compiler):
    compiled = torch.compile(torch.vmap(step, in_dims=(0, 0, None)), fullgraph=True, backend="aot_eager")
    expected = bf.ensemble.join([trained(seeds, compiled) for seeds in bf.ensemble.split(torch.arange(9), 2)], 9)
    for rank in (0, 1):
        assert_equal(on_meshes(f"compiled-{rank}"), expected)


def test_a_dimension_of_a_larger_mesh_holds_ensembles_of_its_own(on_meshes):
    for rank in range(4):
        assert on_meshes(f"row-{rank}")["seeds"].tolist() == [10 * (rank // 2) + seed for seed in range(5)]


def assert_equal(found, expected):
    """Structure, dtypes and bits; contiguous and without a graph."""
    assert_same(found, expected)
    assert bf.trees.flatten(found)[1] == bf.trees.flatten(expected)[1]
    for leaf in bf.trees.flatten(found)[0].values():
        assert leaf.is_contiguous()
        assert not leaf.requires_grad


@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_member_has_one_rank(ranks):
    for members in range(1, 30):
        for size in (1, 2, 7, 40):
            bounds = _members_of_ranks(members, size, ranks)
            assert [m for first, last in bounds for m in range(first, last)] == list(range(members))
            assert all([first % size == 0 or first == members for first, _ in bounds])
            counts = [-(-(last - first) // size) for first, last in bounds]
            assert max(counts) - min(counts) <= 1


# --- Ranks that do not agree all hear of it ---


class Point(NamedTuple):
    x: torch.Tensor


def chunk_of(members=2, dtype=torch.float32, name="w"):
    return {name: torch.zeros(members, 3, dtype=dtype)}


FAULTS = {
    "members": lambda rank, mesh: bf.ensemble.gather([chunk_of()], 4 + rank, mesh),
    "to": lambda rank, mesh: bf.ensemble.gather([chunk_of()], 4, mesh, to=rank),
    "shape": lambda rank, mesh: bf.ensemble.gather([chunk_of(2 + rank)], 4, mesh),
    "dtype": lambda rank, mesh: bf.ensemble.gather([chunk_of(dtype=[torch.half, torch.int][rank])], 4, mesh),
    "leaf": lambda rank, mesh: bf.ensemble.gather([chunk_of(name="wv"[rank])], 4, mesh),
    "structure": lambda rank, mesh: bf.ensemble.gather([[torch.ones(2)] if rank else (torch.ones(2),)], 4, mesh),
    "too few chunks": lambda rank, mesh: bf.ensemble.gather([chunk_of()] * (1 - rank), 4, mesh),
    "too many chunks": lambda rank, mesh: bf.ensemble.gather([chunk_of()] * (1 + rank), 4, mesh),
    "no chunks": lambda rank, mesh: bf.ensemble.gather([], 4, mesh),
    "no leaves": lambda rank, mesh: bf.ensemble.gather([{}], 4, mesh),
    "empty chunks": lambda rank, mesh: bf.ensemble.gather([chunk_of(0)], 4, mesh),
    "one rank alone": lambda rank, mesh: bf.ensemble.gather([chunk_of()], [4, 4.5][rank], mesh),
    "no sequence": lambda rank, mesh: bf.ensemble.gather([[chunk_of()], iter([])][rank], 4, mesh),
    "unlike chunks": lambda rank, mesh: bf.ensemble.gather([chunk_of(), chunk_of(2 + rank)], 8, mesh),
    "to nobody": lambda rank, mesh: bf.ensemble.gather([chunk_of()], 4, mesh, to=2),
    "to a name": lambda rank, mesh: bf.ensemble.gather([chunk_of()], 4, mesh, to="0"),
    "class": lambda rank, mesh: bf.ensemble.gather([Point(torch.ones(2))] * (1 - rank), 2, mesh),
    "same path": lambda rank, mesh: bf.ensemble.gather(
        [{"a/b": torch.ones(2), "a": {"b": torch.ones(2)}} if rank else chunk_of()], 4, mesh
    ),
    "size": lambda rank, mesh: bf.ensemble.shard(torch.arange(4), 0, mesh),
    "no members": lambda rank, mesh: bf.ensemble.shard(torch.arange(0), 2, mesh),
    "no common axis": lambda rank, mesh: bf.ensemble.shard((torch.arange(4), torch.arange(3)), 2, mesh),
    "no mesh": lambda rank, mesh: bf.ensemble.shard(torch.arange(4), 2, "cpu"),
    "two dimensions": lambda rank, mesh: bf.ensemble.gather([], 2, DeviceMesh("cpu", [[0], [1]])),
    "outside": lambda rank, mesh: bf.ensemble.gather([chunk_of()], 2, DeviceMesh("cpu", [0]), to=0),
}

DIFFER = "all ranks give the same"
GONE = r"rank 1 has nothing to gather: TypeError: "
MESSAGES = {
    "members": ["ValueError: members is 5 on rank 1 and 4 on rank 0; " + DIFFER] * 2,
    "to": ["ValueError: to is 1 on rank 1 and 0 on rank 0; " + DIFFER] * 2,
    "shape": [r"ValueError: leaf 'w' is float32 \(3, 3\) on cpu on rank 1 and float32 \(2, 3\) on cpu on rank 0"] * 2,
    "dtype": [r"ValueError: leaf 'w' is int32 \(2, 3\) on cpu on rank 1 and float16 \(2, 3\) on cpu on rank 0"] * 2,
    "leaf": [r"ValueError: leaf 'v' is float32 \(2, 3\) on cpu on rank 1 and nothing on rank 0"] * 2,
    "structure": ["ValueError: chunks on rank 1 are trees of another structure than on rank 0"] * 2,
    "too few chunks": ["ValueError: rank 1 holds 0 chunks of 2, but of 4 members 1 chunks are its own; hand over"] * 2,
    "too many chunks": ["ValueError: rank 1 holds 2 chunks of 2, but of 4 members 1 chunks are its own"] * 2,
    "no chunks": ["ValueError: chunks is empty on every rank; hand over what shard gave"] * 2,
    "no leaves": ["ValueError: chunks hold no leaves"] * 2,
    "empty chunks": ["ValueError: chunks have no members"] * 2,
    "one rank alone": ["ValueError: " + GONE + "members is 4.5", "TypeError: members is 4.5; give a number of members"],
    "no sequence": ["ValueError: " + GONE + "chunks is list_iterator", "TypeError: chunks is list_iterator; give"],
    "unlike chunks": ["ValueError: rank 1 has nothing to gather: ValueError: leaf 'w' has", "ValueError: leaf 'w' has"],
    "to nobody": ["ValueError: to is 2; it must be a rank of the mesh, 0 to 1"] * 2,
    "to a name": ["TypeError: to is '0'; give a rank of the mesh, or None"] * 2,
    "class": [r"ValueError: rank 1 has no chunk and cannot build \w+\.Point; use smaller chunks or fewer ranks"] * 2,
    "same path": ["ValueError: rank 1 has nothing to gather: ValueError: two leaves", "ValueError: two leaves of the"],
    "size": ["ValueError: size is 0; give a number of members"] * 2,
    "no members": ["ValueError: tree has no members; shard takes at least one"] * 2,
    "no common axis": ["ValueError: leaf '1' has 3 members, the first leaf 4"] * 2,
    "no mesh": ["TypeError: mesh is str; give a DeviceMesh"] * 2,
    "two dimensions": [r"ValueError: mesh has 2 dimensions, without names; give the one over which members are"] * 2,
    "outside": ["no error", r"ValueError: rank 1 is not in mesh; the ranks \[0\] call this, no others"],
}


def err(rank, folder):
    start(rank, 2, folder)
    mesh, heard = DeviceMesh("cpu", [0, 1]), {}
    for name, fault in FAULTS.items():
        try:
            fault(rank, mesh)
            heard[name] = "no error"
        except Exception as error:
            heard[name] = f"{type(error).__name__}: {error}"
    # What was refused has lost nothing, and a class that JSON cannot build is gathered where all ranks have one
    point = bf.ensemble.gather([Point(torch.full((2,), float(rank)))], 3, mesh)
    heard["afterwards"] = [type(point).__name__, point.x.tolist()]
    pathlib.Path(f"{folder}/{rank}.json").write_text(json.dumps(heard))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    assert by_rank(err, 2, folder) == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_together_is_an_error_on_all_ranks(errors, name):
    for found, expected in zip(errors, MESSAGES[name], strict=True):
        assert re.match(expected, found[name]), found[name]


def test_after_an_error_the_ranks_go_on(errors):
    assert [found["afterwards"] for found in errors] == [["Point", [0.0, 0.0, 1.0]]] * 2


def test_without_a_process_group_the_error_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"no process group of torch\.distributed; start the program with torchrun"):
        bf.ensemble.shard(torch.arange(3), 2, None)
    with pytest.raises(RuntimeError, match=r"init_device_mesh\('cpu', \(ranks,\)\)"):
        bf.ensemble.gather([torch.arange(3)], 3, None)


def test_a_torch_without_distributed_still_imports_learns_and_says_the_same():
    code = """if True:
        import torch, torch.distributed
        def lacking(*_):
            raise RuntimeError("this torch was built without distributed")
        torch.distributed.is_available = lambda: False
        torch.distributed.is_initialized = lacking
        import biofunc as bf
        params = {"w": torch.ones(3, 2)}
        learn = bf.chain(bf.crystallize, bf.fuzzy_learning_rates, bf.descend(0.1), bf.rejuvenate_weights)
        learn(params, params, learn.init(params, bf.random.key(0)))
        bf.ensemble.shard(torch.arange(3), 2, None)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "RuntimeError: there is no process group" in run.stderr


def test_a_described_tree_can_be_built_or_says_why_not():
    params, state, odd = trained(torch.arange(2), torch.vmap(step, in_dims=(0, 0, None)), steps=1)
    tree = ({"b": params, 0: odd}, state, ())
    described = json.loads(json.dumps(describe(tree)))
    assert unbuildable(described) is None
    built = build(described)
    assert bf.trees.flatten(built)[1] == bf.trees.flatten(tree)[1]
    assert [leaf.shape[0] for leaf in bf.trees.flatten(built)[0].values()] == [0] * len(bf.trees.flatten(tree)[0])
    assert unbuildable(describe({"a": [Point(torch.ones(1))]})).endswith("Point")
    assert unbuildable(describe((state, {1.5: torch.ones(1)}))) == "builtins.dict"


# --- A rank that dies ---


def die(rank, folder):
    start(rank, 2, folder)
    mesh = DeviceMesh("cpu", [0, 1])
    (chunk,) = bf.ensemble.shard(torch.arange(4), 2, mesh)
    for i in range(3):
        tree = trained(chunk, torch.vmap(step, in_dims=(0, 0, None)), steps=i)
        torch.save(tree, f"{folder}/{rank}.partial")
        os.replace(f"{folder}/{rank}.partial", f"{folder}/{rank}.pt")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        bf.ensemble.gather([tree], 4, mesh)
    except RuntimeError as error:
        pathlib.Path(f"{folder}/error").write_text(str(error))


def test_a_rank_that_is_killed_ends_the_others_and_spoils_no_checkpoint(tmp_path):
    assert by_rank(die, 2, tmp_path, within=60) == [0, -signal.SIGKILL]
    assert (tmp_path / "error").read_text()
    chunks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = [trained(seeds, torch.vmap(step, in_dims=(0, 0, None)), steps=2) for seeds in torch.arange(4).split(2)]
    assert_equal(bf.ensemble.join(chunks, 4), bf.ensemble.join(alone, 4))


# --- The command line under torchrun ---


def torchrun(ranks, *words):
    """A command line under torchrun, on one thread and, for speed, where no compiler is found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": str(ROOT)}
    environment["PYTHONFAULTHANDLER"] = "1"  # a rank that aborts says where
    return subprocess.Popen(
        [*command, "-m", "biofunc", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def finished(process, within=120):
    try:
        return process.communicate(timeout=within)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


def test_compare_under_torchrun_is_compare_alone(no_compiler, tmp_path, capsys):
    words = ["compare", "--seeds", str(CHUNK + 1), "--steps", "2", "--arms", "weight_splitting", "--out"]
    process = torchrun(3, *words, str(tmp_path / "ranks"))  # the third rank has nothing to train
    assert main([*words, str(tmp_path / "alone")]) == 0
    printed = finished(process)
    assert process.returncode == 0, printed
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("ranks", "alone")]
    metas = [result.pop("meta") for result in results]
    assert results[0] == results[1]
    assert [meta["ranks"] for meta in metas] == [3, 1]
    for picture in ("curves.png", "rates.png"):
        assert (tmp_path / "ranks" / picture).read_bytes() == (tmp_path / "alone" / picture).read_bytes()
    assert printed.count("| plain ") == capsys.readouterr().out.count("| plain ") == 1
    assert "shared by 3 ranks" in printed
    assert {int(total) for total in re.findall(r"/(\d+) \[", printed)} == {4}  # rank 0's bar: one chunk, two groups


def test_experiment_under_torchrun_is_experiment_alone(no_compiler, tmp_path):
    words = ["experiment", "tests/small_study.toml", "--out"]
    process = torchrun(2, *words, str(tmp_path / "ranks"))
    assert main(["experiment", str(ROOT / "tests" / "small_study.toml"), "--out", str(tmp_path / "alone")]) == 0
    printed = finished(process)
    assert process.returncode == 0, printed
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("ranks", "alone")]
    for name in ("study", "results", "analysis"):
        assert found[0][name] == found[1][name]
    assert printed.count("report.md, results.json and pictures") == 1


def workers_of(process):
    return [int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("signalled", ["a rank is killed", "ctrl-c"])
def test_compare_that_is_ended_under_torchrun_ends_as_a_whole_and_writes_nothing(tmp_path, signalled):
    words = ["compare", "--seeds", str(2 * CHUNK), "--steps", "1000000", "--arms", "crystallize"]
    process = torchrun(2, *words, "--out", str(tmp_path))
    printed, deadline = "", time.monotonic() + 120
    while not re.search(r" [3-9]/1000000", printed) and time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1)[0]:
            printed += os.read(process.stdout.fileno(), 4096).decode()
    workers = workers_of(process)
    assert len(workers) == 2, printed
    if signalled == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(workers[1], signal.SIGKILL)
    printed += finished(process, within=60)
    assert process.returncode != 0
    assert not any([pathlib.Path(f"/proc/{worker}").exists() for worker in workers])
    assert list(tmp_path.iterdir()) == []
    if signalled == "ctrl-c":
        assert printed.count("biofunc: interrupted; nothing was written") == 1
    assert '"/biofunc/' not in printed  # no traceback of ours


def test_memory_stays_flat(tmp_path):
    """400 steps of 100 members, in a process of its own; states that stayed behind would add 23 %."""
    script, report = ROOT / "tests" / "benchmarks" / "memory_flat.py", tmp_path / "memory.json"
    command = [sys.executable, str(script), "--quick", "--json", str(report)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    assert json.loads(report.read_text())["growth"] <= 0.02


def test_data_are_there():
    """The runs above read digits in processes that cannot say so if they are missing."""
    assert len(datasets.load("digits").labels) == 1797
