"""Checkpoints and what can go wrong: damaged and foreign files, full disks, killed processes."""

import errno
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading

import pytest
import safetensors.torch
import torch
from helpers import mlp
from test_checkpoint import frozen, learner

import biofunc as bf
from biofunc import checkpoint_file

HERE = pathlib.Path(__file__).parent
RULES = learner()


def run_of(seed=0):
    params, _ = mlp(seed)
    return {"params": params, "state": RULES.init(params, bf.random.key(seed)), "epoch": seed}


def only(folder, *names):
    return sorted(os.listdir(folder)) == sorted(names)


# --- damaged files ---


def assert_found(path, data):
    """A damaged file is refused, with its path and a remedy."""
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"is damaged: .*go back to a checkpoint|is no checkpoint that can be loaded"
    ) as told:
        bf.load(path)
    assert str(path) in str(told.value)


@pytest.fixture
def small(tmp_path):
    bf.save(tmp_path / "small", {"w": torch.tensor([1.5, -2.0]), "n": 3})
    return (tmp_path / "small").read_bytes()


def test_every_flipped_bit_and_every_cut_is_found(tmp_path, small):
    for index in range(len(small)):
        assert_found(tmp_path / "cut", small[:index])
        for bit in range(8):
            flipped = bytearray(small)
            flipped[index] ^= 1 << bit
            assert_found(tmp_path / "flipped", bytes(flipped))
    assert len(small) * 9 > 3200  # files tried


def damaged(data, chance):
    """One of many ways to damage a file, never the file itself."""
    end = 8 + int.from_bytes(data[:8], "little")
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    new = bytearray(data)
    match chance.randrange(8):
        case 0:
            new[at] = chance.randrange(256)
        case 1:
            del new[at : at + chance.randint(1, 64)]
        case 2:
            new[at:at] = chance.randbytes(chance.randint(1, 64))
        case 3:
            new[at : at + 32] = data[other : other + 32]
        case 4:  # another length of the header
            new[:8] = (end - 8 + chance.randint(-64, 64)).to_bytes(8, "little")
        case 5:  # the header changed, its length put right
            header = bytearray(data[8:end])
            place = chance.randrange(len(header))
            header[place : place + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
            new = bytearray(len(header).to_bytes(8, "little") + header + data[end:])
        case 6:
            new += chance.randbytes(chance.randint(1, 64))
        case 7:  # one digit of the header for another: a shape, an offset, a dtype
            digits = [place for place in range(8, end) if chr(data[place]).isdigit()]
            new[chance.choice(digits)] = ord(chance.choice("0123456789"))
    return bytes(new) if new != data else damaged(data, chance)


def test_6800_damaged_files_are_found(tmp_path):
    bf.save(tmp_path / "run", run_of(), rules=RULES)
    data, chance = (tmp_path / "run").read_bytes(), random.Random(0)
    for _ in range(6800):
        assert_found(tmp_path / "damaged", damaged(data, chance))
    assert frozen(bf.load(tmp_path / "run", rules=RULES)) == frozen(run_of())


# --- files with a right checksum that bf.save did not write ---


def forged(data, metadata=None, header=None):
    """The file with other metadata or headers, signed anew."""
    end = 8 + int.from_bytes(data[:8], "little")
    told = {**json.loads(data[8:end]), **(header or {})}
    told["__metadata__"] = {**told["__metadata__"], **(metadata or {}), "sha256": "0" * 64}
    text = json.dumps(told, separators=(",", ":")).encode()
    new = len(text).to_bytes(8, "little") + text + data[end:]
    return new.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + hashlib.sha256(new).hexdigest().encode(), 1)


W = {"tensor": "w", "dtype": "F32", "shape": [2]}
DEEP = "[" * 100_000 + "]" * 100_000
NESTED = '{"list":[' * 5000 + "1" + "]}" * 5000
FORGED = {
    "a newer format": (
        {"format_version": "2"},
        {},
        "its format version is 2, this biofunc reads version 1; .* biofunc 0",
    ),
    "another format": ({"format": "pt"}, {}, "its format is 'pt', not 'biofunc.checkpoint'"),
    "no tree": ({"tree": ""}, {}, "its tree is damaged"),
    "a bomb of brackets": ({"tree": DEEP}, {}, "its tree is nested deeper than 100"),
    "a bomb of lists": ({"tree": NESTED}, {}, "its tree is nested deeper than 100"),
    "rules that are a bomb": ({"rules": DEEP}, {}, "its rules are damaged"),
    "a missing tensor": (
        {"tree": json.dumps({"list": [W, {**W, "tensor": "v"}]})},
        {},
        "'1' is a tensor 'v', which is missing",
    ),
    "a tensor twice": ({"tree": json.dumps({"list": [W, W]})}, {}, "'1' is a tensor 'w', which is missing or taken"),
    "a tensor nobody names": ({"tree": "3"}, {}, "the tree has no place for its tensor 'w'"),
    "another dtype": (
        {"tree": json.dumps({**W, "dtype": "I32"})},
        {},
        r"the tree should be I32 \[2\], its tensor is F32",
    ),
    "another shape": (
        {"tree": json.dumps({**W, "shape": [1, 2]})},
        {},
        r"should be F32 \[1, 2\], its tensor is F32 \[2\]",
    ),
    "a short float": ({"tree": '{"float": "00 00 00 00 00 0"}'}, {}, "which bf.save does not write"),
    "an unknown node": ({"tree": '{"set": [1]}'}, {}, r"the tree is {'set': \[1\]}, which bf.save does not write"),
    "a bare list": ({"tree": "[1, 2]"}, {}, r"the tree is \[1, 2\], which bf.save does not write"),
    "a function": (
        {"tree": json.dumps({"list": [W, {"reference": "os.system"}]})},
        {},
        "'1' is {'reference': 'os.system'}",
    ),
    "a key twice": ({"tree": '{"dict": [["a", 1], ["a", 2]]}'}, {}, "the tree has a key twice"),
    "a key of another kind": ({"tree": '{"dict": [[null, 1]]}'}, {}, "the tree has an entry without key and value"),
    "an empty state": ({"tree": '{"BioState": {}, "static": null}'}, {}, "which bf.save does not write"),
    "infinity as JSON": ({"tree": '{"list": [Infinity]}'}, {}, "Infinity is no JSON"),
    "a huge tensor": (
        {},
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        "safetensors refuses it",
    ),
    "an overflow": (
        {},
        {"w": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 8]}},
        "safetensors refuses it",
    ),
    "offsets out of range": (
        {},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        "safetensors refuses it",
    ),
    "an unknown dtype": ({}, {"w": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, "safetensors refuses it"),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(tmp_path, small, case):
    metadata, header, message = FORGED[case]
    (tmp_path / "forged").write_bytes(forged(small, metadata, header))
    with pytest.raises(ValueError, match=message):
        bf.load(tmp_path / "forged")


def test_forged_states_and_rules_are_refused(tmp_path):
    bf.save(tmp_path / "run", {"state": run_of()["state"]}, rules=RULES)
    data = (tmp_path / "run").read_bytes()
    tree = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["tree"]
    for old, new in (
        ('"static":{"tuple":', '"static":{"list":'),
        ('"step":{"tensor":"state/step","dtype":"I64","shape":[]}', '"step":7'),
        ('"polarity":{"dict":[]}', '"polarity":null'),
        ('["fc1.bias",{"tuple":[5]}]', '["fc1.bias",{"tuple":["5"]}]'),
    ):
        assert old in tree
        (tmp_path / "forged").write_bytes(forged(data, {"tree": tree.replace(old, new)}))
        with pytest.raises(ValueError, match="is damaged"):
            bf.load(tmp_path / "forged")
    for rules in ("7", '{"list":[{"dict":[["name","adam"]]}]}', '{"list":[1]}'):
        (tmp_path / "forged").write_bytes(forged(data, {"rules": rules}))
        with pytest.raises(ValueError, match="is damaged"):
            bf.load(tmp_path / "forged")


@pytest.mark.parametrize("row", [["fc1.weight", 7], ["fc1.weight", None], [3, {"tuple": [5, 6]}], ["fc1.weight"]])
def test_a_state_with_forged_static_fields_is_refused(tmp_path, row):
    def forge(state):
        state["static"]["tuple"][1]["tuple"][0] = {"tuple": row}

    with pytest.raises(ValueError, match="'state' is a BioState without what belongs to it"):
        bf.load(forged_state(tmp_path, forge))


def test_a_state_that_holds_more_than_tensors_is_refused(tmp_path):
    def forge(state):
        state["plasticity"]["dict"][0][1] = 5

    with pytest.raises(ValueError, match="'state/plasticity' is dict"):
        bf.load(forged_state(tmp_path, lambda state: forge(state["BioState"])))


def forged_state(folder, forge):
    bf.save(folder / "run", run_of(), rules=RULES)
    data = (folder / "run").read_bytes()
    told = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["tree"])
    forge(dict(told["dict"])["state"])
    (folder / "forged").write_bytes(forged(data, {"tree": json.dumps(told)}))
    return folder / "forged"


def test_2000_forged_layouts_raise_nothing_but_value_errors(tmp_path):
    """Whoever signs a file may write any tree into it, but nothing that crashes or runs."""
    bf.save(tmp_path / "run", run_of(), rules=RULES)
    data, chance = (tmp_path / "run").read_bytes(), random.Random(1)
    told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    likes, refused = [None, run_of()], 0
    for _ in range(2000):
        name = chance.choice(["tree", "rules"])
        text = told[name]
        at, other = chance.randrange(len(text)), chance.randrange(len(text))
        snippet = chance.choice(
            ["null", "[]", "{}", '"', "1e999", "-1", text[other : other + 20], "", "]", '{"list":[']
        )
        new = text[:at] + snippet + text[at + chance.randint(0, 20) :]
        (tmp_path / "forged").write_bytes(forged(data, {name: new}))
        try:
            bf.load(tmp_path / "forged", like=chance.choice(likes), rules=chance.choice([None, RULES]))
        except ValueError:
            refused += 1
    assert refused > 1000


# --- foreign files ---


def test_foreign_files_are_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pickle")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "plain")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "pt", {"format": "pt"})
    foreign = {
        "pickle": (None, r"a zip archive, as torch.save writes: torch.load\(path, weights_only=True\)"),
        "plain": (None, "a safetensors file that bf.save did not write: safetensors.torch.load_file"),
        "pt": (None, "its format is 'pt', not 'biofunc.checkpoint'"),
        "empty": (b"", "it has 0 bytes"),
        "image": (b"\x89PNG\r\n\x1a\n" + bytes(1000), "it is cut short, or no safetensors file"),
        "text": (b"epoch = 3\n" * 50, "it is cut short, or no safetensors file"),
        "zeros": (bytes(5000), "its header is damaged, or it is no safetensors file"),
        "bomb": (
            len(DEEP).to_bytes(8, "little") + DEEP.encode(),
            "its header is damaged, or it is no safetensors file",
        ),
        "huge": ((2**63).to_bytes(8, "little") + bytes(64), "it is cut short, or no safetensors file"),
    }
    for name, (data, message) in foreign.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as told:
            bf.load(tmp_path / name)
        assert str(tmp_path / name) in str(told.value)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(Trap(), tmp_path / "trap")
    with pytest.raises(ValueError, match=r"torch.save"):
        bf.load(tmp_path / "trap")
    assert not (tmp_path / "sprung").exists()


# --- paths ---


def test_paths_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("missing", FileNotFoundError), ("pipe", OSError), ("folder", FileNotFoundError)):
        with pytest.raises(kind, match=name):
            bf.load(tmp_path / name)
    with pytest.raises(OSError, match=r"this is not a regular file"):
        bf.load("/dev/zero")


def test_paths_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    for name, kind, message in (
        ("missing/run", FileNotFoundError, "make the folder first"),
        ("folder", IsADirectoryError, "this is a folder; give the path of a file"),
        ("pipe", FileExistsError, "this is not a regular file; give another path"),
        ("file/run", NotADirectoryError, "this is no folder"),
        ("n" * 300, OSError, "cannot save .File name too long."),
    ):
        with pytest.raises(kind, match=message):
            bf.save(tmp_path / name, {"epoch": 3})
    assert only(tmp_path, "pipe", "folder", "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(tmp_path):
    """Root may write everywhere, and is somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "run"
        bf.save(path, {"epoch": 1})
        os.chmod(folder, 0o555)
        os.chmod(path, 0o444)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(
                PermissionError, match=r"cannot save .Permission denied.; what was there before is as it was"
            ):
                bf.save(path, {"epoch": 2})
            assert bf.load(path) == {"epoch": 1}
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o755)
        path.chmod(0o000)
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(PermissionError, match="Permission denied"):
                bf.load(path)
        finally:
            os.seteuid(user)
        assert only(folder, "run")


# --- full disks ---


def test_a_file_that_may_not_grow_leaves_the_last_one(tmp_path):
    """The kernel refuses to write on, as it does where a disk is full."""
    bf.save(tmp_path / "run", run_of(1), rules=RULES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1, 4096, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"cannot save .File too large.; what was there before is as it was"
            ) as told:
                bf.save(tmp_path / "run", {"big": torch.ones(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert told.value.errno == errno.EFBIG
        assert told.value.filename == str(tmp_path / "run")
        assert only(tmp_path, "run")
    assert frozen(bf.load(tmp_path / "run", rules=RULES)) == frozen(run_of(1))


FULL_DISK = """
import errno, os, subprocess, sys, torch, biofunc as bf
folder = sys.argv[1]
path = os.path.join(folder, "run")
bf.save(path, {"good": torch.arange(1000)})
for _ in range(2):
    try:
        bf.save(path, {"big": torch.ones(100_000)})
        raise SystemExit("the disk was not full")
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        assert "cannot save (No space left on device)" in str(error), error
    assert os.listdir(folder) == ["run"]
    assert torch.equal(bf.load(path)["good"], torch.arange(1000))
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
try:
    bf.save(path, {"more": 1})
    raise SystemExit("the disk could be written")
except OSError as error:
    assert error.errno == errno.EROFS, error
assert torch.equal(bf.load(path)["good"], torch.arange(1000))
print("done")
"""


def test_a_full_disk_and_one_that_cannot_be_written_leave_the_last_one(tmp_path):
    mount = f"mount -t tmpfs -o size=128k biofunc {tmp_path}"
    apart = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.geteuid() else []), "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*apart, mount], capture_output=True, timeout=20).returncode:
        pytest.skip("this machine lets nobody mount a disk of his own")
    command = [*apart, f'{mount} && exec "$0" "$@"', sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "done\n", done.stderr


# --- processes that stop, and several at once ---


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_last_one(tmp_path, monkeypatch, call):
    bf.save(tmp_path / "run", {"epoch": 1})

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            bf.save(tmp_path / "run", {"epoch": 2})
    assert only(tmp_path, "run")
    assert bf.load(tmp_path / "run") == {"epoch": 1}


def test_a_save_removes_what_dead_processes_left_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=60)
    left = [f".run.{dead.pid}-0123abcd.tmp", f".run.{os.getpid()}-0123abcd.tmp"]
    others = [
        f".run.{os.getppid()}-0123abcd.tmp",
        f".run2.{dead.pid}-0123abcd.tmp",
        ".run.tmp",
        f".run.{dead.pid}-x.tmp",
    ]
    for name in (*left, *others):
        (tmp_path / name).write_text("")
    bf.save(tmp_path / "run", {"epoch": 1})
    assert only(tmp_path, "run", *others)


def test_readers_see_whole_checkpoints_while_several_threads_save(tmp_path):
    trees = [{"w": torch.full((20_000,), float(index)), "index": index} for index in range(3)]
    bf.save(tmp_path / "run", trees[0])
    errors, stop = [], threading.Event()

    def write(tree):
        try:
            while not stop.is_set():
                bf.save(tmp_path / "run", tree)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            loaded = bf.load(tmp_path / "run")
            assert frozen(loaded) == frozen(trees[loaded["index"]])
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert only(tmp_path, "run")
    assert not checkpoint_file._writing


def test_50_killed_runs_go_on_to_the_same_bits():
    """SIGKILL at random moments, half of them while a save is under way."""
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_saves.py"), "50"],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == counts["same"] == 50, (counts, done.stderr)
    assert counts["temporaries left in the end"] == 0
    assert counts["during a save"] >= 5  # of the 25 that are timed so, the others come too late on a slow machine
