"""Plasticity: the rivals as rules, and the study of learning task after task, at small sizes."""

import inspect
import math
import tomllib

import pytest
import test_laws
import torch
from helpers import assert_same, mlp
from table import Row

import biofunc as bf
from biofunc import datasets, philox
from biofunc.rule import as_rule
from biofunc.studies import available, continual, continual_chains, continual_training
from biofunc.studies.continual_training import Member, Trainer
from biofunc.studies.l2_init import l2_init
from biofunc.studies.shrink_and_perturb import shrink_and_perturb

PLAN = {"samples": 40, "tasks": 5, "epochs": 2, "period": 3}
CHOSEN = {
    "plain": {},
    "rejuvenate_weights": {"rate": 0.1},
    "random_turnover": {"rate": 0.1},
    "crystallize": {"dampening_factor": 0.9},
    "crystallize_recovering": {"dampening_factor": 0.9, "floor": 0.1, "recovery": 0.1},
    "synaptic_scaling": {"rate": 0.1},
    "fuzzy_learning_rates": {"nu": 0.5},
    "l2_init": {"strength": 0.01},
    "shrink_and_perturb": {"shrink": 0.1, "perturb": 0.2},
}


def l2_init_loop(w, g, memory, draws, strength=1e-3):
    return w, [g[i] + 2 * strength * (w[i] - memory["start"][i]) for i in range(len(w))], memory


def shrink_and_perturb_loop(w, g, memory, draws, shrink=0.6, perturb=0.1, distribution="uniform"):
    (draw,) = draws(len(w), distribution)
    new = []
    for i in range(len(w)):
        z = draw[i] if distribution == "normal" else math.sqrt(3) * (2 * draw[i] - 1)
        new.append((1 - shrink) * w[i] + perturb * memory["spread"][0] * z)
    return new, g, memory


ROWS = [
    Row(
        "l2_init",
        lambda **keywords: as_rule(l2_init).bind(**keywords),
        ({}, {"strength": 0.3}),
        {"strength": 0.0},
        ("strength",),
        l2_init_loop,
        smooth=("strength",),
    ),
    Row(
        "shrink_and_perturb",
        lambda **keywords: as_rule(shrink_and_perturb).bind(**keywords),
        ({}, {"shrink": 0.2, "perturb": 0.7, "distribution": "normal"}),
        {"shrink": 0.0, "perturb": 0.0},
        ("shrink", "perturb"),
        shrink_and_perturb_loop,
        reduces=True,
        smooth=("shrink", "perturb"),
    ),
]
LAWS = [
    (law, set(inspect.signature(law).parameters))
    for name, law in vars(test_laws).items()
    if name.startswith("test_") and "row" in inspect.signature(law).parameters
]
OTHERS = {
    "dtype": [torch.float32, torch.bfloat16],
    "count": [1, 3],
    "broken": [float("nan"), float("inf")],
    "where": ["params", "grads"],
}


@pytest.fixture(autouse=True)
def draws_as_before(monkeypatch):
    """Whether draws are accelerated holds for the process; a test puts it back."""
    monkeypatch.setattr(philox, "ACCELERATED", philox.ACCELERATED)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.given)
@pytest.mark.parametrize(("law", "takes"), LAWS, ids=[law.__name__ for law, _ in LAWS])
def test_the_rivals_obey_the_laws(law, takes, row, monkeypatch):
    monkeypatch.setattr(bf, row.given, {"l2_init": l2_init, "shrink_and_perturb": shrink_and_perturb}[row.given], False)
    cases = [{"row": row}]
    for name, values in {"settings": row.settings, **OTHERS}.items():
        if name in takes:
            cases = [{**case, name: value} for case in cases for value in values]
    if "compile" in law.__name__ and continual_training.compiler_works("cpu"):
        bf.random.accelerate()  # as the study does; without, the generator takes long to compile
    for case in cases:
        law(**case)


def test_l2_init_is_the_gradient_of_the_penalty():
    params, _ = mlp(dtype=torch.float64)
    moved = {path: w + 0.1 * i for i, (path, w) in enumerate(params.items())}
    penalty = lambda p: 0.3 * sum([((p[path] - params[path]) ** 2).sum() for path in p])  # noqa: E731
    state = bf.init(params, bf.random.key(0), l2_init)
    none = {path: torch.zeros_like(w) for path, w in params.items()}
    _, grads, _ = l2_init(moved, none, state, strength=0.3)
    assert_same(grads, torch.func.grad(penalty)(moved), ulps=4)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_perturbations_have_the_spread_of_the_initial_weights(distribution):
    params = {"w": 0.3 * bf.random.normal(bf.random.key(1), (200, 200)), "b": torch.full((3,), 0.7)}
    state = bf.init(params, bf.random.key(0), shrink_and_perturb)
    moved = {"w": torch.full((200, 200), 5.0), "b": torch.ones(3)}
    new, _, _ = shrink_and_perturb(moved, moved, state, shrink=1.0, perturb=1.0, distribution=distribution)
    assert abs(new["w"].mean()) < 0.01
    assert abs(new["w"].std() - 0.3) < 0.005
    limit = 0.3 * math.sqrt(3) * 1.02
    assert (new["w"].abs().max() < limit) == (distribution == "uniform")
    assert torch.equal(new["b"], torch.zeros(3))


@pytest.fixture
def plain_vmap(monkeypatch):
    monkeypatch.setattr(continual_training, "compiler_works", lambda device: False)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits")


def test_random_labels_are_balanced_and_new_in_every_task(digits):
    keys = bf.random.key(torch.arange(3))
    (x, first), (same, second) = [
        continual_training.task_data("random_label_digits", digits, 400, keys, number) for number in (0, 1)
    ]
    assert torch.equal(x, same)
    assert not torch.equal(x[0], x[1])
    for labels in (first, second):
        assert all(torch.bincount(row, minlength=10).tolist() == [40] * 10 for row in labels)
    agreement = (first == second).float().mean(1)
    assert ((agreement > 0.03) & (agreement < 0.19)).all()
    assert ((first[0] == first[1]).float().mean() - 0.1).abs() < 0.07


def test_permuted_digits_are_digits_with_their_pixels_in_one_new_order(digits):
    keys = bf.random.key(torch.arange(2))
    tasks = [continual_training.task_data("permuted_digits", digits, 100, keys, number) for number in (0, 1)]
    (first, labels), (second, again) = tasks
    assert torch.equal(labels, again)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(-1).values, second.sort(-1).values)  # each image keeps its pixels
    columns = [sorted(x[0].T.tolist()) for x in (first, second)]  # and all images of a seed have one order
    assert columns[0] == columns[1]
    picture = {tuple(sorted(image)): label for image, label in zip(digits.inputs.tolist(), digits.labels.tolist())}  # noqa: B905
    shown = [picture[tuple(sorted(image))] for image in first[1].tolist()]
    assert (torch.tensor(shown) == labels[1]).float().mean() > 0.98  # a few images have the same pixels


def test_batches_show_every_sample_once_an_epoch():
    keys = bf.random.key(torch.arange(2))
    found = continual_training.batches(60, 2, keys, 0)
    assert found.shape == (6, 2, continual_training.BATCH)
    for seed in range(2):
        for epoch in range(2):
            assert sorted(found[3 * epoch : 3 * epoch + 3, seed].flatten().tolist()) == list(range(60))
    assert not torch.equal(found[:3], found[3:])
    assert not torch.equal(found[:, 0], found[:, 1])
    assert not torch.equal(found, continual_training.batches(60, 2, keys, 1))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_mechanism_at_its_off_setting_is_plain(plain_vmap, optimizer):
    """The group with re-drawing counts Adam's steps per synapse: the same numbers, from another program."""
    off = {arm: continual_chains.OFF[continual_chains.ARMS[arm]] for arm in CHOSEN if arm != "plain"}
    members = [Member(arm, off.get(arm, {}), 0.01, 7) for arm in CHOSEN]
    runs = Trainer("random_label_digits", optimizer, PLAN, chunk=9).train(members, lambda n: None)
    assert all(run == runs[0] for run in runs)


def test_every_mechanism_does_something_when_on(plain_vmap):
    members = [Member(arm, setting, 0.01, 7) for arm, setting in CHOSEN.items()]
    trainer = Trainer("random_label_digits", "adam", PLAN, chunk=9)
    runs = dict(zip(CHOSEN, trainer.train(members, lambda n: None), strict=True))
    ranks = [run["effective rank"] for run in runs.values()]
    assert len(set(ranks)) == len(ranks)
    for arm, run in runs.items():  # 20 steps are 6 periods, over 5 tasks
        expected = 6 / 5 * 0.1 if arm in continual_chains.REDRAWING else 0.0
        assert run["turnover"] == pytest.approx(expected, abs=1e-3), arm


def test_a_run_does_not_depend_on_the_chunk_that_it_shares(plain_vmap):
    members = [Member(arm, CHOSEN[arm], 0.01, seed) for seed in (3, 4) for arm in ("plain", "random_turnover")]
    few, many = [
        Trainer("permuted_digits", "adam", PLAN, chunk=chunk).train(members, lambda n: None) for chunk in (1, 3)
    ]
    for left, right in zip(few, many, strict=True):
        assert left["curve online accuracy"] == right["curve online accuracy"]
        assert left["effective rank"] == pytest.approx(right["effective rank"], rel=1e-4)
    assert few[0] != few[2]


def test_two_chains_and_a_period_are_one_chain_with_every(plain_vmap):
    hyper = continual_chains.hyperparameters("rejuvenate_weights", {"rate": 0.2})
    hyper["shrink_and_perturb"] = CHOSEN["shrink_and_perturb"]
    rules = continual_chains.make_periodic_chain(hyper, redraws=True).rules
    params, _ = bf.ensemble.init(continual_training.make_model, [0])
    params = {path: w[0] for path, w in params.items()}
    grads = {path: 0.1 * w.sign() for path, w in params.items()}
    activity = {path: torch.ones(w.shape[0]) for path, w in params.items() if w.dim() == 2}
    target = {path: a * 0.5 for path, a in activity.items()}
    step = continual_chains.make_chain("adam", 0.01, hyper)
    whole = bf.chain(*step.rules, *[bf.every(3, rule) for rule in rules])
    start = Trainer("random_label_digits", "adam", PLAN)._init(params, bf.random.key(0), hyper, redraws=True)
    apart, together = (params, start), (params, start)
    for number in range(7):
        new, _, state = step(apart[0], grads, apart[1], activity=activity, target=target)
        apart = (new, state)
        if (number + 1) % 3 == 0:
            apart = continual_training._renew(*apart, hyper, redraws=True)
        new, _, state = whole(together[0], grads, together[1], activity=activity, target=target)
        together = (new, state)
    assert_same(apart, together)


def test_plain_is_torch_s_own_adam(plain_vmap, digits):
    """Online accuracy counts each batch before the step on it."""
    (run,) = Trainer("random_label_digits", "adam", PLAN, chunk=1).train([Member("plain", {}, 0.01, 5)], lambda n: None)
    key = bf.random.key(torch.tensor([5]))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = continual_training.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for number in range(PLAN["tasks"]):
        x, y = [leaf[0] for leaf in continual_training.task_data("random_label_digits", digits, 40, key, number)]
        right = 0
        for batch in continual_training.batches(40, 2, key, number)[:, 0]:
            y_hat = model(x[batch])
            right += (y_hat.argmax(-1) == y[batch]).sum().item()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(y_hat, y[batch]).backward()
            optimizer.step()
        assert abs(run["curve online accuracy"][number] - right / 80) < 1.5 / 80  # rounding may tip one sample


def test_silence_and_rank_of_a_known_network():
    params, _ = bf.ensemble.init(continual_training.make_model, [0])
    params = {path: torch.zeros_like(w[0]) for path, w in params.items()}
    x = torch.cat([torch.eye(4), torch.zeros(4, 60)], 1)
    params["0.weight"][:4, :4] = torch.eye(4)
    params["2.weight"][:2, :2] = torch.eye(2)
    dead, rank = continual_training.silence_and_rank(params, x)  # 4 + 2 of 100 units fire; two equal singular values
    assert dead.item() == pytest.approx(0.94)
    assert rank.item() == pytest.approx(2.0)
    nothing = {path: torch.zeros_like(w) for path, w in params.items()}
    assert [leaf.item() for leaf in continual_training.silence_and_rank(nothing, x)] == [1.0, 0.0]


def test_dead_neurons_have_no_target():
    state = bf.BioState(bf.random.key(0), torch.zeros((), dtype=torch.int64), activity={"w": torch.tensor([0.0, 1, 2])})
    assert_same(continual_training._target(state), {"w": torch.tensor([torch.nan, 1.0, 1.0])})


@pytest.fixture
def study():
    study = tomllib.loads(available()["plasticity"].read_text())
    study |= {"seeds": 2, "tuning_seeds": [1000], "arms": {arm: [setting] for arm, setting in CHOSEN.items()}}
    study["arms"]["l2_init"] = [{"strength": 0.01}, {"strength": 0.1}]
    study["optimizers"] = {"adam": {"lr": [0.01, 1e-6]}}
    study["tasks"] = {"random_label_digits": PLAN}
    return study


def test_end_to_end(plain_vmap, study):
    (job,) = continual.jobs(study)
    done = []
    results = job.run(done.append)
    assert sum(done) == job.steps
    (arms,) = results.values()
    assert list(results) == ["random_label_digits, adam"]
    assert list(arms) == list(study["arms"])
    assert list(arms["plain"]) == ["lr=0.01", "lr=1e-06"]
    assert list(arms["l2_init"]) == ["strength=0.01", "strength=0.1"]
    for arm, settings in arms.items():
        best = max(settings, key=lambda setting: settings[setting]["tuning accuracy"][0])
        for setting, metrics in settings.items():
            assert len(metrics["tuning accuracy"]) == 1
            assert ("mean online accuracy" in metrics) == (setting == best), arm
        assert len(settings[best]["mean online accuracy"]) == 2
        assert len(settings[best]["curve online accuracy"][0]) == PLAN["tasks"]
    (lr,) = [float(name[3:]) for name, metrics in arms["plain"].items() if len(metrics) > 1]
    (again,) = Trainer("random_label_digits", "adam", PLAN, chunk=1).train([Member("plain", {}, lr, 1)], lambda n: None)
    assert arms["plain"][f"lr={lr:g}"]["curve online accuracy"][1] == again["curve online accuracy"]


def test_the_compiled_run_agrees_with_plain_vmap(monkeypatch, fresh_compiler):
    members = [Member(arm, CHOSEN[arm], 0.01, 3) for arm in ("plain", "l2_init")]
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **keywords: compile_(step, backend="aot_eager", **keywords))
    compiled = Trainer("random_label_digits", "adam", PLAN, chunk=2)
    assert hasattr(compiled.step, "_torchdynamo_orig_callable")
    found = compiled.train(members, lambda n: None)
    bf.random.accelerate(False)
    monkeypatch.setattr(continual_training, "compiler_works", lambda device: False)
    plain = Trainer("random_label_digits", "adam", PLAN, chunk=2).train(members, lambda n: None)
    for left, right in zip(found, plain, strict=True):
        assert left["mean online accuracy"] == pytest.approx(right["mean online accuracy"], abs=2.5 / 400)


def test_the_study_that_is_shipped_is_sound(study):
    shipped = tomllib.loads(available()["plasticity"].read_text())
    continual.check(shipped)
    assert set(shipped["arms"]) == set(continual_chains.ARMS)
    assert {len(settings) for arm, settings in shipped["arms"].items() if arm != "plain"} == {4}
    assert shipped["decision"]["metric"] in continual_training.summary(torch.ones(6, 4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arms": {"plain": [{}], "sleep": [{}]}}, "arms holds 'sleep'"),
        ({"arms": {"l2_init": [{}]}}, "arms lacks 'plain'"),
        ({"arms": {"plain": [{}], "l2_init": []}}, "arms.l2_init has no setting"),
        ({"arms": {"plain": [{}], "l2_init": [{"lambda": 1}]}}, "arms.l2_init sets 'lambda'; it takes strength"),
        ({"arms": {"plain": [{}], "l2_init": [{"strength": -1}]}}, "strength is -1"),
        ({"arms": {"plain": [{}], "rejuvenate_weights": [{"rate": 1}]}}, "rate is 1"),
        ({"tasks": {"mnist": PLAN}}, "tasks holds 'mnist'"),
        ({"tasks": {"permuted_digits": {**PLAN, "tasks": 2}}}, "permuted_digits.tasks is 2.*5"),
        ({"tasks": {"permuted_digits": {**PLAN, "period": 0}}}, "permuted_digits.period is 0"),
        ({"tasks": {"permuted_digits": {**PLAN, "samples": 5000}}}, "permuted_digits.samples is 5000"),
        ({"optimizers": {"lion": {"lr": [0.1]}}}, "optimizers holds 'lion'"),
        ({"optimizers": {"adam": {"lr": [0.1, -1]}}}, "optimizers.adam.lr is"),
        ({"tuning_seeds": []}, "tuning_seeds is"),
        ({"tuning_seeds": [1]}, "tuning_seeds .1. meet the 2 seeds"),
    ],
)
def test_what_cannot_be_run_is_named(study, wrong, message):
    continual.check(study)
    with pytest.raises(ValueError, match=message):
        continual.check({**study, **wrong})
