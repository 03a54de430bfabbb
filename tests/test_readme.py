"""What the README shows is run."""

import pathlib
import re

import pytest
import torch

import biofunc as bf

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun tells a process that is alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)


def test_every_example_runs(blocks, one_rank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, steps = {}, []
    with torch.random.fork_rng():
        for block in blocks:
            exec(block, namespace)  # the README is our own text
            attached = namespace["synapses"].state.step.tolist() if "synapses" in namespace else None
            steps.append((namespace["state"].step.tolist(), attached))
    trained = [3] * 100
    assert steps[1:6] == [(trained, None), (trained, 3), (trained, 1), (trained, 1), (1, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop.safetensors", "run.safetensors", "sharded"]
    assert namespace["y_hat"].shape == (8, 64, 10)
    assert ([3] * 10, 1) in steps  # of the sharded ensemble
    state = namespace["learn"].init({"w": torch.ones(2, 2)}, bf.random.key(0))
    params, _, state = namespace["learn"]({"w": torch.ones(2, 2)}, {"w": torch.ones(2, 2)}, state)
    assert params["w"].shape == (2, 2)


def test_quickstart_has_at_most_15_lines(blocks):
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 15


def test_table_of_mechanisms_names_every_one():
    text = README.read_text()
    for name in bf.__all__:
        made = ("Attachment", "BioState", "Chain", "Converted", "Hyperparameter", "Rule")  # what calls return
        assert name in text or name in (*made, "init", "layers"), name
