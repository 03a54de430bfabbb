"""Studies from the command line: reading, resuming, stopping, deciding."""

import errno
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import matplotlib.image
import pytest

from biofunc import experiment, studies
from biofunc.__main__ import main
from biofunc.studies import Job, analysis, pictures, report

STUDY = """
question = "Does it run?"
kind = "toy"
seeds = 6
shift = 0.5
[decision]
metric = "score"
select = "validation"
control = "plain"
[controls]
good = "bad"
[quick]
shift = 0.25
"""


class Toy:
    """A kind of study that computes nothing: good is better than plain, bad worse, same the same."""

    def __init__(self):
        self.runs = []
        self.at = {}

    def check(self, study):
        if study["shift"] < 0:
            raise ValueError(f"shift is {study['shift']}; it is at least 0")

    def jobs(self, study):
        return [Job(f"part {i}", 10, lambda advance, i=i: self.run(study, i, advance)) for i in range(3)]

    def run(self, study, number, advance):
        self.runs.append(number)
        advance(10)
        if number in self.at:
            self.at.pop(number)()
        base = [float(seed) for seed in range(study["seeds"])]

        def metrics(shift, validation):
            values = [value + shift + 0.01 * seed for seed, value in enumerate(base)]
            curve = [[0.5 * v, v] for v in values]
            return {"score": values, "validation": [validation] * len(base), "steps to 1": base, "curve score": curve}

        shift = study["shift"]
        arms = {
            "plain": {"lr=1": {**metrics(0.0, 1.0), "score": base}},
            "good": {
                "lr=1": metrics(-9.0, 0.0),
                "lr=2": metrics(shift, 2.0),
                "lr=3": metrics(9.0, 1.0),
            },
            "bad": {"lr=1": metrics(-shift - 0.1, 1.0)},
            "same": {"lr=1": {**metrics(0.0, 1.0), "score": base}},
        }
        return {f"task {number}": arms}


@pytest.fixture
def toy(monkeypatch):
    kind, original = Toy(), studies.module
    monkeypatch.setattr(experiment, "module", lambda name: kind if name == "toy" else original(name))
    monkeypatch.setattr("biofunc.compare.compiler_works", lambda device: False)
    kind.pictures = pictures.pictures
    monkeypatch.setattr(pictures, "pictures", lambda summary: {})  # drawn in one test only: it takes a second
    return kind


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "toys.toml"
    file.write_text(STUDY)
    return file


def words(path, *more):
    return ["experiment", str(path), "--out", str(path.parent / "out"), *more]


def test_runs_decides_and_reports(toy, path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "pictures", toy.pictures)
    assert main(words(path)) == 0
    out = path.parent / "out"
    assert toy.runs == [0, 1, 2]
    expected = ["curves.png", "forest.png", *[f"part {i}.json" for i in range(3)], "report.md", "results.json"]
    assert sorted(file.name for file in out.iterdir()) == expected
    summary = experiment.decode(json.loads((out / "results.json").read_text()))
    arms = summary["analysis"]["conditions"]["task 1"]["arms"]
    assert arms["good"]["setting"] == "lr=2"
    assert arms["good"]["difference"] == pytest.approx(0.5 + 0.025)
    assert arms["good"]["p"] == 2 / 2**6
    assert arms["good"]["p holm"] == pytest.approx(3 * 2 / 2**6)
    # 6 seeds cannot pass Holm over three arms at 0.05
    assert {name: arm["verdict"] for name, arm in arms.items()} == {
        "plain": "control",
        "good": "no effect found",
        "bad": "no effect found",
        "same": "no effect found",
    }
    controls = summary["analysis"]["conditions"]["task 1"]["controls"]
    assert [(c["arm"], c["control"], c["verdict"]) for c in controls] == [("good", "bad", "helps")]
    assert controls[0]["difference"] == pytest.approx(1.1)
    text = (out / "report.md").read_text()
    assert text == report.report(summary)  # nothing in the report that the JSON does not hold
    assert f"`python -m biofunc experiment {path}`" in text
    assert "quick" not in text.lower()
    assert "| good " in capsys.readouterr().out
    for picture in ("forest.png", "curves.png"):
        assert matplotlib.image.imread(out / picture).std() > 0.01
    # with more arms than lines that can be told apart there are no curves, and the report names none
    monkeypatch.setattr(pictures, "COLOURS", pictures.COLOURS[:1])
    assert list(toy.pictures(summary)) == ["forest.png"]
    assert report.report(summary) == text.replace("![Curves](curves.png)\n\n", "")


def test_enough_seeds_make_verdicts_and_smaller_may_be_better(toy, path):
    def verdicts():
        assert main(words(path, "--seeds", "9")) == 0
        found = json.loads((path.parent / "out" / "results.json").read_text())["analysis"]["conditions"]["task 0"]
        return {name: arm["verdict"] for name, arm in found["arms"].items()}

    assert verdicts() == {"plain": "control", "good": "helps", "bad": "harms", "same": "no effect found"}
    path.write_text(STUDY.replace('control = "plain"', 'control = "plain"\nsmaller_is_better = true'))
    # selection turns round with it: the setting with the smallest "validation" is taken
    assert verdicts() == {"plain": "control", "good": "helps", "bad": "helps", "same": "no effect found"}
    path.write_text(STUDY.replace('control = "plain"', 'control = "plain"\nsmallest = 0.55'))
    assert verdicts() == {"plain": "control", "good": "no effect found", "bad": "harms", "same": "no effect found"}


def test_without_selection_each_setting_is_a_row(toy, path):
    path.write_text(STUDY.replace('select = "validation"\n', "").replace('good = "bad"', ""))
    assert main(words(path)) == 0
    arms = json.loads((path.parent / "out" / "results.json").read_text())["analysis"]["conditions"]["task 0"]["arms"]
    assert list(arms) == ["plain", "good, lr=1", "good, lr=2", "good, lr=3", "bad", "same"]
    assert arms["good, lr=3"]["control"] == "plain"


def test_quick_says_so_first_and_decides_nothing(toy, path):
    assert main(words(path, "--quick", "--seeds", "9")) == 0
    text = (path.parent / "out" / "report.md").read_text()
    assert text.startswith("**Quick run")
    assert "helps" not in text.split("## The decision rule")[0]
    study = json.loads((path.parent / "out" / "results.json").read_text())["study"]
    assert (study["quick"], study["shift"], study["seeds"]) == (True, 0.25, 9)
    assert experiment.load(str(path), quick=True)["seeds"] == 3


def test_a_second_run_computes_nothing_and_says_the_same(toy, path):
    main(words(path))
    before = json.loads((path.parent / "out" / "results.json").read_text())
    main(words(path))
    after = json.loads((path.parent / "out" / "results.json").read_text())
    assert toy.runs == [0, 1, 2]
    assert after["analysis"] == before["analysis"]
    assert after["meta"]["seconds"] == before["meta"]["seconds"]


def test_interrupt_keeps_what_is_done_and_goes_on(toy, path, capsys):
    def stop():
        raise KeyboardInterrupt

    toy.at[1] = stop
    assert main(words(path)) == 130
    assert "interrupted; 1 of 3 jobs are kept" in capsys.readouterr().err
    assert [file.name for file in (path.parent / "out").iterdir()] == ["part 0.json"]
    assert main(words(path)) == 0
    assert toy.runs == [0, 1, 1, 2]


def test_full_disk_gets_one_line_and_loses_nothing(toy, path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    toy.at[1] = lambda: monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stopped:
        main(words(path))
    assert stopped.value.code != 0
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "1 of 3 jobs are kept" in last
    assert [file.name for file in (path.parent / "out").iterdir()] == ["part 0.json"]
    monkeypatch.undo()


@pytest.mark.parametrize("content", [b"", b'{"fingerprint": "', b"[]", b"\xff\xfe", b'{"fingerprint": "x"}'])
def test_damaged_results_are_set_aside(toy, path, content):
    out = path.parent / "out"
    study = experiment.load(str(path))
    jobs = experiment.jobs_of(study)
    out.mkdir()
    experiment.run(study, jobs, out, lambda doing, steps: None)
    (out / "part 1.json").write_bytes(content)
    (out / "part 2.json.partial").write_bytes(content)  # what a kill in the middle of writing leaves
    said = []
    experiment.run(study, jobs, out, lambda doing, steps: None, say=said.append)
    assert toy.runs == [0, 1, 2, 1]
    assert len(said) == 1
    assert "damaged" in said[0]
    assert (out / "part 1.json.aside1").read_bytes() == content


def test_results_of_another_study_are_set_aside(toy, path, capsys):
    main(words(path))
    main(words(path, "--seeds", "7"))
    assert toy.runs == [0, 1, 2, 0, 1, 2]
    assert capsys.readouterr().out.count("another study, seeds or version") == 3
    path.write_text(STUDY.replace("shift = 0.5", "shift = 0.75"))
    main(words(path))
    assert toy.runs == [0, 1, 2] * 3
    assert len(list((path.parent / "out").glob("*.aside*"))) == 6


@pytest.mark.parametrize("content", ['{"study": {"name": "others"}}', '{"arms": {}, "meta": {}}'])
def test_a_folder_with_other_results_is_refused_before_anything_runs(toy, path, content, capsys):
    out = path.parent / "out"
    out.mkdir()
    (out / "results.json").write_text(content)
    with pytest.raises(SystemExit):
        main(words(path))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "give another folder" in line]
    assert re.search("results.json' holds results of '(others|biofunc compare)'", line)
    assert (out / "results.json").read_text() == content
    (out / "results.json").unlink()
    (out / "damaged.json").write_text("[")
    toy.at[1] = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    assert main(words(path)) == 130  # what it leaves names the study as well
    other = path.rename(path.with_name("more.toml"))
    with pytest.raises(SystemExit):
        main(["experiment", str(other), "--out", str(out)])
    assert "part 0.json' holds results of 'toys'; give another folder" in capsys.readouterr().err
    assert toy.runs == [0, 1]


def test_it_says_at_once_what_it_does(toy, path, capsys):
    toy.at[1] = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    main(words(path))
    main(words(path))
    said = capsys.readouterr().err
    assert said.startswith("loading study toys …\nstudy toys: 3 jobs, 0 done\n")
    assert "\nstudy toys: 3 jobs, 1 done\n" in said


def test_kill_in_the_middle_then_the_same_command_goes_on(path, tmp_path):
    """A process that is killed leaves whole files only; the next one does the rest."""
    path.write_text((pathlib.Path(__file__).parent / "small_study.toml").read_text())
    command = [sys.executable, "-m", "biofunc", *words(path)]
    out = tmp_path / "out"
    plain = {**os.environ, "PATH": "", "CXX": ""}  # no compiler is found: quick to start
    running = subprocess.Popen(command, env=plain, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("*.json")) and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.json")}
    assert kept
    subprocess.run(command, env=plain, check=True, capture_output=True)
    assert (out / "report.md").exists()
    assert {name: (out / name).stat().st_mtime_ns for name in kept if name != "results.json"} == {
        name: stamp for name, stamp in kept.items() if name != "results.json"
    }


def test_numbers_that_are_not_finite_survive_strict_json():
    value = {"a": [1.0, math.inf, [-math.inf]], "b": {"c": math.nan}, "d": "text"}
    text = json.dumps(experiment.encode(value), allow_nan=False)
    back = experiment.decode(json.loads(text))
    assert math.isnan(back["b"].pop("c"))
    assert back == {"a": [1.0, math.inf, [-math.inf]], "b": {}, "d": "text"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds = 6", "seeds = 0"), "seeds is 0; give a positive integer"),
        (("seeds = 6", ""), "lacks 'seeds'"),
        (('metric = "score"', ""), "lacks 'metric'"),
        (('control = "plain"', 'control = "plain"\nalpha = 2'), "alpha is 2; it lies in (0, 1)"),
        (('control = "plain"', 'control = "plain"\nbest = 1'), "'best' is unknown"),
        (('kind = "toy"', 'kind = "magic"'), "kind is 'magic'; it must be one of classification"),
        (("shift = 0.5", "shift = -1"), "shift is -1; it is at least 0"),
        (("seeds = 6", "seeds = "), "is no TOML"),
    ],
)
def test_a_wrong_study_gets_one_line_and_exit_2(toy, path, capsys, change, message):
    path.write_text(STUDY.replace(*change, 1))
    with pytest.raises(SystemExit) as stopped:
        main(words(path))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.strip().count("\n") == 0


def test_an_unknown_study_lists_those_there_are(capsys):
    for name, message in (("lernen", "give combination,"), ("/none/at/all.toml", "No such file")):
        with pytest.raises(SystemExit) as stopped:
            main(["experiment", name])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_runs(toy, path, capsys, monkeypatch):
    for package in ("scipy", "matplotlib", "tqdm"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(SystemExit):
                main(words(path))
        assert "pip install '.[demo,eval]' in the checkout" in capsys.readouterr().err
    assert toy.runs == []


def test_every_study_that_is_there_passes_its_own_check():
    for name in studies.available():
        for quick in (False, True):
            study = experiment.load(name, quick=quick)
            assert study["name"] == name
            assert experiment.jobs_of(study)
        assert experiment.load(name)["seeds"] >= 15


def test_jobs_need_names_of_their_own(toy, path, monkeypatch):
    study = experiment.load(str(path))
    for names in (("a", "a"), ("a/b",), ("",)):
        monkeypatch.setattr(toy, "jobs", lambda study, names=names: [Job(name, 1, dict) for name in names])
        with pytest.raises(ValueError, match="needs a name of its own"):
            experiment.jobs_of(study)


def test_unpaired_runs_and_a_missing_control_are_refused(toy, path):
    study = experiment.load(str(path))
    arms = {"plain": {"": {"score": [1.0, 2.0]}}, "good": {"": {"score": [1.0]}}}
    with pytest.raises(ValueError, match="comparisons are paired"):
        analysis.analyse(study, {"task": arms})
    with pytest.raises(ValueError, match="has no arm 'plain', the control"):
        analysis.analyse(study, {"task": {"good": arms["good"]}})
    with pytest.raises(ValueError, match="has no 'score', the metric of the decision"):
        analysis.analyse(study, {"task": {"plain": {"": {"loss": [1.0]}}}})


def test_an_interval_that_leaves_out_0_without_a_claim_says_why():
    found = {"verdict": "no effect found", "interval": [0.0009, 0.0076], "p holm": 0.109}
    assert report._claim(found, 4) == "no effect found (CI +0.0009 … +0.0076, p 0.1090)"
    assert report._claim({**found, "interval": [-0.0009, 0.0076]}, 4) == "no effect found (CI -0.0009 … +0.0076)"
    assert report._claim({**found, "verdict": "helps"}, 4) == "helps"


def test_reports_count_threads_and_do_not_say_mean_twice(toy, path):
    path.write_text(STUDY.replace('metric = "score"', 'metric = "mean score"'))
    study = experiment.load(str(path))
    (rule, _) = report._rule_blocks(study)
    assert "if its mean score is larger" in rule
    assert "the best mean validation over seeds" in rule
    assert (report._count(1, "thread"), report._count(2, "core")) == ("1 thread", "2 cores")


def test_waiting_times_are_medians_with_censored_runs_counted():
    assert analysis._central("steps to 90%", [10.0, 30.0, math.inf]) == {"median": 30.0, "never": 1}
    assert analysis._central("steps to 90%", [10.0, math.inf]) == {"median": math.inf, "never": 1}
    assert analysis._central("loss", [1.0, 3.0]) == {"mean": 2.0}
