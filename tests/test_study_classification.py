"""The studies of classification: arms are what they say, paired, and independent of how they are grouped."""

import copy
import math
import pathlib
import tomllib

import pytest
import torch

import biofunc as bf
from biofunc import datasets, experiment, studies
from biofunc.studies import analysis, classification, classification_arms, classification_training

SMALL = tomllib.loads((pathlib.Path(__file__).parent / "small_study.toml").read_text())


@pytest.fixture
def small():
    return copy.deepcopy(SMALL)


def run(study):
    results = {}
    for job in classification.jobs(study):
        done = []
        experiment._merge(results, job.run(done.append), job.name)
        assert sum(done) == job.steps
    return results


def accuracies(results, condition, arm, setting):
    return results[condition][arm][setting]["curve test accuracy"]


def test_every_arm_has_every_rate_in_every_condition(small):
    results = run(small)
    assert list(results) == ["digits, sgd", "digits, adam, update phase", "digits, adam, gradient phase"]
    for condition, arms in results.items():
        assert set(arms) == set(small["arms"])
        rates = ["lr=0.3"] if "sgd" in condition else ["lr=0.001", "lr=0.01"]
        for settings in arms.values():
            assert list(settings) == rates
            for metrics in settings.values():
                assert {len(values) for values in metrics.values()} == {2}
                assert [curve[-1] for curve in metrics["curve test accuracy"]] == metrics["test accuracy"]
    update, gradient = results["digits, adam, update phase"], results["digits, adam, gradient phase"]
    for arm in ("plain", "turnover", "split", "narrow"):
        assert update[arm] == gradient[arm]
    # a constant factor on the gradient cancels in Adam, and does not on its update
    assert accuracies(results, "digits, adam, gradient phase", "fuzzy", "lr=0.01") == accuracies(
        results, "digits, adam, gradient phase", "plain", "lr=0.01"
    )
    analysis.analyse({**small, "name": "small", "quick": False}, results)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_plain_is_what_torch_optim_does(small, optimizer):
    small["optimizers"] = {optimizer: {"lr": [0.05], "momentum": 0.9}}
    small["arms"] = {"plain": {}, "fuzzy": {"nu": 0.16}}
    small["phases"] = ["update"]
    data = datasets.load("digits")
    found = run(small)[f"digits, {optimizer}"]["plain"]["lr=0.05"]
    keys = bf.random.key(torch.arange(2))
    train, validation, test = classification_training.splits(keys, len(data.labels))
    own = list(classification_training.batches(keys, train, 64, 6))
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
        optim = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
            "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, lr=0.05),
        }[optimizer](model.parameters())
        for batch in own:
            optim.zero_grad()
            torch.nn.functional.cross_entropy(model(data.inputs[batch[seed]]), data.labels[batch[seed]]).backward()
            optim.step()
        for name, chosen in (("validation accuracy", validation), ("test accuracy", test)):
            hits = model(data.inputs[chosen[seed]]).argmax(-1) == data.labels[chosen[seed]]
            assert abs(found[name][seed] - hits.double().mean()) < 1.5 / len(chosen[seed])  # one sample at most


def test_a_result_does_not_depend_on_chunks_arms_or_number_of_seeds(small, monkeypatch):
    small["optimizers"] = {"adam": {"lr": [0.001, 0.01]}}
    small["phases"] = ["update"]
    whole = run(small)
    monkeypatch.setattr(classification_training, "CHUNK", 3)
    assert run(small) == whole
    fewer = copy.deepcopy(small)
    fewer["arms"] = {name: small["arms"][name] for name in ("plain", "turnover", "narrow")}
    fewer["seeds"] = 1
    for condition, arms in run(fewer).items():
        for arm, settings in arms.items():
            for setting, metrics in settings.items():
                for metric, values in metrics.items():
                    assert values == whole[condition][arm][setting][metric][:1]


def group_of(study, *arms, steps=6, **task):
    study["arms"] = {name: study["arms"].get(name, {}) for name in arms}
    study["data"]["digits"].update(steps=steps, **task)
    study["optimizers"], study["phases"] = {"adam": {"lr": [0.01]}}, ["update"]
    return classification_training.Training(classification_arms.groups(study)[0], datasets.load("digits"))


def test_turnover_acts_in_its_period_at_the_same_rate_for_weak_and_for_random_synapses(small):
    small["arms"]["random"] = {"random_dre": 8.0}
    small["seeds"] = 20
    training = group_of(small, "plain", "turnover", "random", hidden=128)
    seen = []
    original = training.turn_over

    def spy(params, state, hyper):
        after, state_after = original(params, state, hyper)
        seen.append(0)
        return after, state_after

    training.turn_over = spy
    training(torch.arange(60), lambda n: None)
    assert len(seen) == 1  # 6 steps, period 4
    params = {name: p[torch.arange(60) % 20] for name, p in training.params.items()}
    rules = [rule for chain in (*training.chains, *classification_training.TURNOVER.values()) for rule in chain.rules]
    state = torch.vmap(lambda p, k: bf.init(p, k, *rules))(params, bf.random.key(torch.arange(60) % 20))
    hyper = {
        "dre": torch.tensor([math.inf, 8.0, math.inf]).repeat_interleave(20),
        "random_dre": torch.tensor([math.inf, math.inf, 8.0]).repeat_interleave(20),
    }
    after, moved = torch.vmap(original)(params, state.replace(step=state.step + 4), hyper)
    assert (moved.step == 4).all()
    changed = (after["0.weight"] != params["0.weight"]).double().flatten(1).mean(1)
    assert (changed[:20] == 0).all()
    # some 10 % of 8192 uniform weights: the standard error of a mean of 20 members is 0.0007
    assert abs(changed[20:40].mean() - changed[40:].mean()) < 0.004
    assert 0.08 < changed[20:40].mean() < 0.12
    size = params["0.weight"].abs()
    weak, any_ = [size[i : i + 20][after["0.weight"][i : i + 20] != params["0.weight"][i : i + 20]] for i in (20, 40)]
    assert weak.mean() < 0.3 * any_.mean()


def test_splits_and_batches_cover_each_members_own_data():
    keys = bf.random.key(torch.arange(3))
    train, validation, test = classification_training.splits(keys, 200)
    assert [part.shape[1] for part in (train, validation, test)] == [120, 40, 40]
    for member in range(3):
        assert sorted(torch.cat([train[member], validation[member], test[member]]).tolist()) == list(range(200))
    assert not torch.equal(test[0], test[1])
    own = list(classification_training.batches(keys, train, 50, 5))
    epoch = torch.cat(own[:2], 1)
    assert all(len(set(row.tolist())) == 100 for row in epoch)
    assert all(set(row.tolist()) <= set(of.tolist()) for row, of in zip(epoch, train, strict=True))
    assert not torch.equal(own[0], own[2])


def test_compiled_is_plain(small, monkeypatch, fresh_compiler):
    plain = group_of(small, "plain", "fuzzy")
    members = torch.arange(4)
    expected = plain(members, lambda n: None)
    monkeypatch.setattr(classification_training, "COMPILE_FROM", 1)
    compiled = group_of(small, "plain", "fuzzy")
    assert compiled.step is not plain.step
    found = compiled(members, lambda n: None)
    for name in ("test accuracy", "validation accuracy"):  # rounding may tip one of 359 samples
        assert torch.tensor(found[name]).sub(torch.tensor(expected[name])).abs().max() < 1.5 / 359


def test_a_level_that_is_not_reached_takes_forever(small):
    training = group_of(small, "plain", level=0.999)
    assert training(torch.arange(2), lambda n: None)["steps to 100%"] == [math.inf, math.inf]
    training = group_of(small, "plain", level=0.0)
    assert training(torch.arange(2), lambda n: None)["steps to 0%"] == [3.0, 3.0]  # the first of two evaluations


def test_factors_make_every_combination_once():
    study = experiment.load("combination")
    made = classification_arms.arms(study)
    assert len(made) == 32
    assert made["plain"] == classification_arms.OFF
    assert made["crystallize + weight_splitting"] == {**classification_arms.OFF, "dampening_factor": 0.6, "gamma": 2}
    assert sum(len(group.arms) for group in classification_arms.groups(study)) == 64


def test_the_learning_study_is_the_one_that_is_described():
    study = experiment.load("learning")
    groups = classification_arms.groups(study)
    assert {group.data for group in groups} == set(datasets.DATASETS)
    assert all(len(group.rates) == 5 for group in groups)
    arms = classification_arms.arms(study)
    assert arms["random_turnover"]["random_dre"] == arms["rejuvenate_weights"]["dre"]
    for task in study["data"].values():  # the last turnover leaves time to recover
        assert task["steps"] % task["turnover_period"] > 40
    conditions = {c for group in groups for arm in group.arms for c in classification_arms.conditions(group, arm)}
    assert len(conditions) == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["data"].update(cifar=s["data"].pop("digits")), r"\[data.cifar\]: the data sets are digits"),
        (lambda s: s["optimizers"].update(lion={"lr": [1]}), r"\[optimizers.lion\]: the optimizers are sgd"),
        (lambda s: s["optimizers"]["sgd"].update(lr=[0.1, -1]), r"lr is \[0.1, -1\]; give a list of positive"),
        (lambda s: s.update(phases=["dream"]), "phases holds 'dream'; it must be gradient or update"),
        (lambda s: s["arms"]["fuzzy"].update(mu=1), "'fuzzy' sets 'mu'; it may set nu,"),
        (lambda s: s["decision"].update(control="nothing"), "control is 'nothing'; the arms are plain, fuzzy"),
        (lambda s: s["controls"].update(split="wide"), "'wide' is no arm"),
        (lambda s: s["data"]["digits"].update(steps=0), "steps is 0; give a positive integer"),
        (lambda s: s["data"]["digits"].update(hidden=7), "gamma 2 does not divide"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(small, change, message):
    change(small)
    with pytest.raises(ValueError, match=message):
        classification.check(small)


def test_kinds_that_exist_are_listed():
    with pytest.raises(ValueError, match="kind is 'magic'; it must be one of classification"):
        studies.module("magic")
    assert studies.module("classification") is classification
