"""Checkpoints of DTensors: each process writes its part, any number of processes reads them."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from sharded_saves import same, tree, whole
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import biofunc as bf
from biofunc import checkpoint_file, checkpoint_parts, checkpoint_sharded

HERE = pathlib.Path(__file__).parent


def test_groups_of_processes_save_load_go_on_fail_and_are_killed():
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "sharded_saves.py")],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["groups"] == 12
    assert counts["kills"] == counts["whole after a kill"] == 6
    assert counts["loads beside saves"] > 6


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def saved(mesh, tmp_path):
    bf.save(tmp_path / "run", tree(mesh))
    return tmp_path / "run"


def files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_the_folder_holds_safetensors_files_alone(saved):
    index, part = files(saved)
    assert index.name == "index.safetensors"
    assert safetensors.torch.load_file(index) == {}
    assert torch.equal(safetensors.torch.load_file(part)["spread/rows"], tree()["spread"]["rows"])
    assert same(bf.load(saved), tree())


def test_a_new_save_replaces_the_parts(saved, mesh):
    bf.save(saved, {"w": distribute_tensor(torch.ones(3), mesh, [Shard(0)]), "epoch": 1})
    assert len(files(saved)) == len(os.listdir(saved)) == 2
    assert same(bf.load(saved), {"w": torch.ones(3), "epoch": 1})


def test_damage_to_any_file_is_found(saved):
    """Flipped bits and cuts at 64 places of each file; a file that is missing, one too many, one of another save."""
    whole = {file: file.read_bytes() for file in files(saved)}
    for file, data in whole.items():
        for place in range(0, len(data), len(data) // 64):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            for damaged in (bytes(flipped), data[:place]):
                file.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"is damaged|no checkpoint that can be loaded"):
                    bf.load(saved)
        file.write_bytes(data)
    part = next(file for file in whole if file.name != "index.safetensors")
    more = part.with_name("shard-00009-model-00001-of-00001.safetensors")
    shutil.copy(part, more)
    with pytest.raises(ValueError, match="is one too many; go back"):
        bf.load(saved)
    part.rename(more)
    with pytest.raises(ValueError, match="is missing; go back"):
        bf.load(saved)
    more.rename(part)
    shutil.copytree(part.parent, saved / "other")
    shutil.rmtree(part.parent)
    with pytest.raises(ValueError, match="is missing; go back"):
        bf.load(saved)
    (saved / "index.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.safetensors"):
        bf.load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": "../elsewhere"}, "its index does not name the folder of its parts"),
        ({"parts": ""}, "its index does not name the folder of its parts"),
        ({"files": "[" * 100_000}, "its index does not name the files"),
        ({"files": '{"../../x": "0"}'}, "is missing"),
        ({"files": "[]"}, "its index does not name the files"),
        ({"tree": "1"}, "the tree has no place for its tensor"),
    ],
)
def test_forged_indices_are_refused(saved, changes, message):
    from test_checkpoint_faults import forged

    index = saved / "index.safetensors"
    index.write_bytes(forged(index.read_bytes(), changes))
    with pytest.raises(ValueError, match=message):
        bf.load(saved)


def test_files_and_folders_are_not_taken_for_each_other(tmp_path, mesh):
    spread = {"w": distribute_tensor(torch.ones(3), mesh, [Shard(0)])}
    bf.save(tmp_path / "file", {"w": torch.ones(3)})
    bf.save(tmp_path / "folder", spread)
    with pytest.raises(OSError, match="file"):
        bf.save(tmp_path / "file", spread)
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        bf.save(tmp_path / "folder", {"w": torch.ones(3)})
    assert same(bf.load(tmp_path / "file", like=spread), spread)
    assert same(bf.load(tmp_path / "folder"), {"w": torch.ones(3)})


def forged(folder, offsets, shape):
    """Signs a part that says it lies elsewhere, and an index that says its tensor is of another shape."""
    _, part = files(folder)
    data = part.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"][CUSTOM_METADATA_KEY] = json.dumps({"w": {"saved_offsets": offsets}})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    index = checkpoint_file.metadata_of((folder / "index.safetensors").read_bytes())
    del index["sha256"]
    index["files"] = json.dumps({part.name: checkpoint_parts.checksum(str(part))})
    index["tree"] = json.dumps({"dict": [["w", {"tensor": "w", "dtype": "F32", "shape": shape}]]})
    checkpoint_file.write(str(folder / "index.safetensors"), {}, index)


@pytest.mark.parametrize(
    ("offsets", "shape", "message"),
    [
        ([3, 0], [10, 5], "the parts of tensor 'w' do not make a whole"),
        ([10**13, 0], [10**13 + 7, 5], "the parts of tensor 'w' do not make a whole"),
        ("x", [7, 5], r"its parts cannot be read \(TypeError"),
    ],
)
def test_forged_parts_make_no_tensor(mesh, tmp_path, offsets, shape, message):
    weight = distribute_tensor(torch.arange(35.0).reshape(7, 5), mesh, [Shard(0)])
    bf.save(tmp_path / "run", {"w": weight})
    forged(tmp_path / "run", [0, 0], [7, 5])
    assert torch.equal(bf.load(tmp_path / "run")["w"], weight.full_tensor())
    forged(tmp_path / "run", offsets, shape)
    with pytest.raises(ValueError, match=message):
        bf.load(tmp_path / "run")


def test_an_error_that_cannot_travel_is_told_by_its_name(mesh):
    class StrangeError(Exception):
        def __init__(self, one, other):  # pickle cannot make it again
            super().__init__(f"{one} {other}")

    def fail():
        raise StrangeError("no", "luck")

    with pytest.raises(StrangeError, match="no luck"):  # here it is what it was
        checkpoint_sharded._together(fail)
    for error in (StrangeError("no", "luck"), ValueError("no luck", lambda: 0)):
        told = checkpoint_sharded._portable(error)
        assert type(told) is RuntimeError
        assert str(told) == f"{type(error).__name__}: {error}"
    assert type(checkpoint_sharded._portable(KeyError("w"))) is KeyError


@pytest.mark.parametrize("step", ["shapes", "fill"])
def test_a_save_beside_a_load(saved, mesh, monkeypatch, step):
    """The parts are removed under the hands of a load: it takes the new ones, unless it is one of several processes."""
    work = getattr(checkpoint_parts, step)

    def interrupted(*arguments):
        if len(calls) < 1:
            calls.append(arguments)
            bf.save(saved, tree(mesh, moved=True))
        return work(*arguments)

    monkeypatch.setattr(checkpoint_parts, step, interrupted)
    calls = []
    assert same(bf.load(saved), tree(moved=True))
    assert calls
    calls = []
    with pytest.raises((ValueError, OSError), match=r"is missing|cannot load|No such file"):
        bf.load(saved, like=tree(mesh))
    assert same(bf.load(saved, like=tree(mesh)), tree(moved=True))


def test_a_hyperparameter_may_be_a_dtensor(mesh, tmp_path):
    def rules(lr):
        return [bf.descend(distribute_tensor(torch.tensor(lr), mesh, [Replicate()]))]

    for leaf in (1, distribute_tensor(torch.ones(3), mesh, [Shard(0)])):
        bf.save(tmp_path / f"{type(leaf)}", {"w": leaf}, rules=rules(0.5))
        bf.load(tmp_path / f"{type(leaf)}", rules=rules(0.5))
        with pytest.raises(ValueError, match=r"descend: lr is 0\.5 in the checkpoint and 0\.25 here"):
            bf.load(tmp_path / f"{type(leaf)}", rules=rules(0.25))


def test_a_file_is_not_replaced_by_a_folder(mesh, tmp_path):
    bf.save(tmp_path / "run", {"w": torch.ones(3)})
    with pytest.raises(NotADirectoryError, match="takes a folder and this is a file"):
        bf.save(tmp_path / "run", {"w": distribute_tensor(torch.ones(3), mesh, [Shard(0)])})
    assert same(bf.load(tmp_path / "run"), {"w": torch.ones(3)})


def test_parts_that_the_index_names_stay_whatever_fails_after(saved, mesh, monkeypatch):
    sync, folders = checkpoint_file.sync_folder, []

    def fail_at_last(folder):
        folders.append(folder)
        if folder == str(saved):
            raise OSError(errno.EIO, "Input/output error")
        sync(folder)

    monkeypatch.setattr(checkpoint_file, "sync_folder", fail_at_last)
    with pytest.raises(OSError, match="saved, but a power cut may undo it"):
        bf.save(saved, {"w": distribute_tensor(torch.ones(3), mesh, [Shard(0)])})
    assert len(folders) == 2
    assert same(bf.load(saved), {"w": torch.ones(3)})


def test_hyperparameters_that_are_tensors_are_compared(mesh, tmp_path):
    def rules(lr):
        return [bf.descend(torch.tensor(lr))]

    weight = {"w": distribute_tensor(torch.ones(3), mesh, [Shard(0)])}
    bf.save(tmp_path / "run", weight, rules=rules(0.1))
    assert same(bf.load(tmp_path / "run", rules=rules(0.1)), whole(weight))
    with pytest.raises(ValueError, match=r"descend: lr is .* in the checkpoint and .* here"):
        bf.load(tmp_path / "run", rules=rules(0.2))
