"""Gradient inversion: attacks against what they claim, quality against definitions, matching, pairing, a tiny study."""

import copy
import math
import pathlib
import tomllib

import numpy
import pytest
import torch
from helpers import assert_same, values

import biofunc as bf
from biofunc.studies import inversion, inversion_attacks, inversion_victims
from biofunc.studies.gradient_noise import gradient_noise
from biofunc.studies.gradient_pruning import gradient_pruning
from biofunc.studies.inversion import ATTACKERS
from biofunc.studies.inversion_victims import Defence, Task
from biofunc.studies.reconstruction import cosine_attack, least_squares, midrange, one_row, psnr, rank_one, ssim

STUDY = tomllib.loads((pathlib.Path(inversion.__file__).parent / "inversion.toml").read_text())
CLOSED = Task("closed form", "digits", 8, "weights")
COSINE = Task("cosine", "digits", 8, "weights and biases")


def small(**changes):
    return {**copy.deepcopy(STUDY), "seeds": 3, "steps": 4, "iterations": 6, "images": 2, "rounds": 2, **changes}


def victims(study, task, defence):
    data = inversion_victims.load(study, task)
    return data, inversion_victims.train_victims(study, task, data, lambda steps: None, defence)


def layer_gradients(seed, rows=40, inputs=12, dtype=torch.float64):
    """The gradients of a first layer, and the input in [0, 1] that they belong to."""
    x = values(seed, (inputs,), dtype, "x").abs().clamp(max=1)
    delta = values(seed, (rows,), dtype, "delta")
    return torch.outer(delta, x), delta, x


@pytest.mark.parametrize("estimator", [one_row, least_squares, lambda w, b: midrange(w, b, 0.0), rank_one])
def test_closed_form_is_exact_without_a_defence(estimator):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)).double()
    image = values(1, (8, 8), torch.float64).abs().clamp(max=1)
    torch.nn.functional.cross_entropy(model(image.reshape(1, 64)), torch.tensor([3])).backward()
    found = estimator(model[0].weight.grad, model[0].bias.grad).reshape(8, 8)
    assert psnr(found, image) > 100


def test_estimators_under_unknown_rates_err_as_they_say():
    """An average errs by nu over the root of the rows, the middle of the bounds by nu over the rows."""
    weight, bias, x = layer_gradients(0, rows=400)
    rate = 1 + 0.3 * (2 * bf.random.uniform(bf.random.key(1), weight.shape, dtype=torch.float64) - 1)
    errors = [
        (f(weight * rate, bias) - x).square().mean().sqrt()
        for f in (one_row, least_squares, lambda w, b: midrange(w, b, 0.3))
    ]
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 3
    row_rate = 1 + 0.3 * (2 * bf.random.uniform(bf.random.key(2), bias.shape, dtype=torch.float64) - 1)
    assert (rank_one(weight * rate, bias * row_rate) - x).norm() / x.norm() < 0.05


def test_estimators_leave_out_what_is_zero():
    weight, bias, x = layer_gradients(0)
    kept = bf.random.uniform(bf.random.key(3), weight.shape) < 0.3
    assert kept.any(0).all()
    pruned = weight * kept
    for estimator in (least_squares, lambda w, b: midrange(w, b, 0.0)):
        torch.testing.assert_close(estimator(pruned, bias), x, rtol=1e-9, atol=1e-12)
    nothing = torch.zeros_like(weight)
    for estimator in (one_row, least_squares, lambda w, b: midrange(w, b, 0.0), rank_one):
        assert torch.equal(estimator(nothing, torch.zeros_like(bias)), torch.zeros_like(x))


def test_psnr_and_ssim_are_their_definitions():
    x = values(4, (2, 9, 10), torch.float64, "x").abs()  # some pixels exceed 1: they are clipped
    y = values(4, (2, 9, 10), torch.float64, "y").abs().clamp(max=1)
    for i in range(2):
        a, b = x[i].clamp(0, 1).numpy(), y[i].numpy()
        assert psnr(x, y)[i].item() == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()))
        windows = []
        for row in range(9 - 6):
            for column in range(10 - 6):
                u, v = [p[row : row + 7, column : column + 7].reshape(-1) for p in (a, b)]
                s = numpy.cov(u, v)
                c1, c2 = 1e-4, 9e-4
                windows.append(
                    (2 * u.mean() * v.mean() + c1)
                    * (2 * s[0, 1] + c2)
                    / ((u.mean() ** 2 + v.mean() ** 2 + c1) * (s[0, 0] + s[1, 1] + c2))
                )
        assert ssim(x, y)[i].item() == pytest.approx(numpy.mean(windows))
    assert psnr(y, y).tolist() == [150, 150]
    torch.testing.assert_close(ssim(y, y), torch.ones(2, dtype=torch.float64))


def test_noise_and_pruning_do_what_their_strength_says():
    params = {"w": values(5, (200, 100))}
    grads = {"w": 3.0 * values(6, (200, 100))}
    state = bf.init(params, bf.random.key(0), gradient_noise, gradient_pruning)
    _, noisy, _ = gradient_noise(params, grads, state, strength=0.5)
    rms = grads["w"].square().mean().sqrt()
    assert ((noisy["w"] - grads["w"]).std() / (0.5 * rms)).item() == pytest.approx(1, abs=0.03)
    assert_same(gradient_noise(params, grads, state, strength=0.0)[1], grads)
    _, pruned, _ = gradient_pruning(params, grads, state, share=0.75)
    assert (pruned["w"] == 0).sum() == 15000
    kept = pruned["w"] != 0
    assert torch.equal(pruned["w"][kept], grads["w"][kept])
    assert grads["w"][kept].abs().min() > grads["w"][~kept].abs().max()
    assert_same(gradient_pruning(params, grads, state, share=0.0)[1], grads)
    share = torch.tensor([0.0, 0.75])
    many = torch.vmap(lambda s: gradient_pruning(params, grads, state, share=s)[1]["w"])(share)
    assert torch.equal(many, torch.stack([grads["w"], pruned["w"]]))


def test_matched_strength_is_the_largest_that_costs_no_more():
    assert inversion.strongest([0.1, 0.2, 0.4, 0.8], [-0.01, 0.001, 0.004, 0.1], 0.004) == 0.4
    assert inversion.strongest([0.1, 0.2], [0.3, 0.4], 0.002) == 0.1  # nothing is affordable: the weakest
    study = small(
        arms={"none": {}, "cheap": {"nu": 0.1}, "dear": {"nu": 0.9}},
        matching={"loss": 0.002, "noise": [0.1, 1.0], "pruning": [0.5, 0.9]},
    )
    accuracy = {
        Defence(): 0.9,
        Defence(nu=0.1): 0.95,
        Defence(nu=0.9): 0.85,
        Defence(noise=0.1): 0.899,
        Defence(noise=1.0): 0.86,
        Defence(pruning=0.5): 0.9,
        Defence(pruning=0.9): 0.84,
    }
    chosen = inversion.match(study, accuracy)
    assert list(chosen) == ["none", "cheap", "dear", *[f"{k} for {a}" for a in ("cheap", "dear") for k in KINDS]]
    assert chosen["noise for cheap"] == Defence(noise=0.1)  # a gain of the mechanism still allows a loss of 0.002
    assert chosen["noise for dear"] == Defence(noise=1.0)
    assert chosen["pruning for dear"] == Defence(pruning=0.5)


KINDS = ("noise", "pruning")


def test_convolution_is_that_of_torch():
    x = values(7, (2, 3, 7, 7), torch.float64)
    with torch.random.fork_rng():
        ours = inversion_victims.Convolution(3, 4, 3, stride=2, padding=1).double()
    torch.testing.assert_close(ours(x), ours._conv_forward(x, ours.weight, ours.bias))


def test_defences_are_paired_and_a_seed_does_not_depend_on_the_others():
    few, many = [inversion_victims.load(small(seeds=n), CLOSED) for n in (2, 4)]
    for field in ("train", "test", "private"):
        assert torch.equal(getattr(few, field), getattr(many, field)[:2])
    for seed in range(2):
        dealt = torch.cat([few.train[seed], few.test[seed], few.private[seed]])
        assert torch.equal(dealt.sort().values, torch.arange(1797))
    data, plain = victims(small(steps=2), CLOSED, Defence())
    # what does nothing changes nothing: all that is not the defence is the same
    _, weakest = victims(small(steps=2), CLOSED, Defence(pruning=1e-9))
    assert_same(plain.params, weakest.params)
    _, alone = victims(small(steps=2, seeds=2), CLOSED, Defence())
    assert_same({path: p[:2] for path, p in plain.params.items()}, alone.params, ulps=32)
    assert not torch.equal(data.truth()[0], data.truth()[1])


@pytest.mark.parametrize("task", [CLOSED, Task("closed form", "digits", 8, "weights and biases")])
def test_a_defence_acts_on_what_it_defends(task):
    study = small(rounds=1)
    data, found = victims(study, task, Defence(nu=0.5))
    observed = inversion_attacks.observe(study, data, Defence(nu=0.5), found)
    scaled = {path for path in observed.exact if not torch.equal(observed.unaware[path], observed.exact[path])}
    weights = {"1.weight", "3.weight"}
    assert scaled == (weights if task.defended == "weights" else {*weights, "1.bias", "3.bias"})


@pytest.mark.parametrize(
    ("defence", "attacker"),
    [
        (Defence(nu=0.5), "exact"),
        (Defence(dampening_factor=0.6), "adaptive"),
        (Defence(stability_factor=2.0), "adaptive"),
        (Defence(nu=0.16, dampening_factor=0.6, stability_factor=2.0), "exact"),
    ],
)
def test_who_knows_the_rates_sees_the_gradient_itself(defence, attacker):
    study = small()
    data, found = victims(study, COSINE, defence)
    undone = getattr(inversion_attacks.observe(study, data, defence, found), attacker)
    # the same networks without a defence
    bare = inversion_victims.Victims(found.model, found.params, _no_rates(study, data), {}, found.accuracy)
    plain = inversion_attacks.observe(study, data, Defence(), bare).unaware
    for path in plain:
        torch.testing.assert_close(undone[path], plain[path], rtol=1e-5, atol=1e-12)


def _no_rates(study, data):
    params, _ = bf.ensemble.init(lambda: inversion_victims.make_model(COSINE, 12), range(study["seeds"]))
    chain = bf.chain(*Defence().rules())
    return torch.vmap(chain.init)(params, data.keys)


def test_known_rates_give_the_cosine_attack_of_no_defence():
    study = small(seeds=2, iterations=12)
    data, plain = victims(study, COSINE, Defence())
    _, fuzzy = victims(study, COSINE, Defence(nu=0.5))
    fuzzy = inversion_victims.Victims(plain.model, plain.params, fuzzy.state, fuzzy.innate, plain.accuracy)
    images = []
    for defence, trained in ((Defence(), plain), (Defence(nu=0.5), fuzzy)):
        observed = inversion_attacks.observe(study, data, defence, trained)
        images.append(inversion_attacks.cosine_images(study, data, defence, trained, observed, lambda steps: None))
    torch.testing.assert_close(
        images[1]["knows rates"]["cosine, rates undone"], images[0]["unaware"]["cosine"], rtol=0, atol=2e-2
    )
    assert (images[1]["unaware"]["cosine"] - images[0]["unaware"]["cosine"]).abs().max() > 0.1
    assert images[0]["adaptive"] == {}  # nothing more is known than what is shared


def test_rounds_average_fresh_noise_away():
    ratio = []
    for rounds in (1, 16):
        study = small(rounds=rounds, images=1)
        data, found = victims(study, CLOSED, Defence(noise=0.5))
        plain = inversion_victims.Victims(found.model, found.params, found.state, found.innate, found.accuracy)
        noisy = inversion_attacks.observe(study, data, Defence(noise=0.5), found).adaptive["1.weight"]
        clean = inversion_attacks.observe(study, data, Defence(), plain).adaptive["1.weight"]
        ratio.append(((noisy - clean).square().mean() / clean.square().mean()).sqrt().item())
    assert ratio[0] == pytest.approx(0.5, rel=0.1)
    assert ratio[1] == pytest.approx(0.125, rel=0.1)


def test_cosine_attack_finds_images_and_unknown_rates():
    """A linear gradient of 4 x 4 images: more equations than pixels, so that rates and images are determined."""
    mixing = values(8, (16, 400))
    truth = values(9, (1, 6, 4, 4)).abs().clamp(max=1)

    def gradient(images, labels):
        return images.flatten(-2) @ mixing

    rate = 1 + 0.4 * (2 * bf.random.uniform(bf.random.key(5), (400,)) - 1)
    start = bf.random.uniform(bf.random.key(6), truth.shape)
    shared, labels = gradient(truth, None) * rate, torch.zeros(1, 6)
    steps = []
    found = [
        cosine_attack(gradient, shared, labels, start, iterations=400, smoothness=0.0, advance=steps.append, **options)
        for options in (
            {"spread": torch.full((400,), 0.4)},
            {},
            {"seen": torch.zeros(400).index_fill(0, torch.arange(8), 1.0)},
        )
    ]
    # a cosine does not see the size of an image
    alike = [torch.nn.functional.cosine_similarity(f.flatten(-2), truth.flatten(-2), dim=-1).mean() for f in found]
    assert 1 - alike[0] < 0.5 * (1 - alike[1])
    assert alike[1] > 0.99
    assert alike[2] < alike[1]
    assert sum(steps) == 1200
    assert all(f.min() >= 0 and f.max() <= 1 for f in found)


@pytest.mark.parametrize("task", STUDY["tasks"][:1] + STUDY["tasks"][5:6])
def test_a_tiny_study_end_to_end(task, monkeypatch):
    monkeypatch.setattr(inversion, "compiler_works", lambda device: False)
    arms = {name: STUDY["arms"][name] for name in ("none", "fuzzy_learning_rates, nu=0.16", "weight_splitting")}
    study = small(tasks=[task], arms=arms, controls={}, matching={"loss": 0.002, "noise": [0.1, 3.0], "pruning": [0.5]})
    inversion.check(study)
    (job,) = inversion.jobs(study)
    steps = []
    results = job.run(steps.append)
    assert sum(steps) == job.steps
    assert "/" not in job.name
    names = {*arms, *[f"{kind} for {arm}" for kind in KINDS for arm in arms if arm != "none"]}
    best = {}
    for attacker in ATTACKERS:
        condition = results[f"{job.name}, {attacker}"]
        assert set(condition) == names
        for arm, settings in condition.items():
            ((setting, metrics),) = settings.items()
            assert setting.startswith("strength=") == (" for " in arm)
            assert all(len(v) == 3 and all(math.isfinite(x) for x in v) for v in metrics.values())
            best[attacker, arm] = metrics["PSNR of the best attacker"]
    for arm in names:  # knowledge never hurts
        curves = [best[attacker, arm] for attacker in ATTACKERS]
        assert all(a <= b <= c for a, b, c in zip(*curves, strict=True))
    if task["attack"] == "closed form":
        fuzzy = "fuzzy_learning_rates, nu=0.16"
        assert (
            best["unaware", "none"] == best["unaware", "weight_splitting"] == best["knows rates", fuzzy] == [58.9] * 3
        )
        assert max(best["unaware", fuzzy]) < 55
        assert min(results[f"{job.name}, unaware"]["none"][""]["PSNR, one row"]) > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"magic": {}}}, "arms lacks none"),
        ({"arms": {"none": {}, "a": {"dre": 8}}}, "arm 'a' sets 'dre'; an arm sets nu, dampening_factor"),
        ({"arms": {"none": {}, "a": {"nu": 1.5}}}, "nu of arm 'a' is 1.5; it must lie in"),
        ({"arms": {"none": {}, "a": {"gamma": 5}}}, "gamma of arm 'a' does not divide hidden 32"),
        ({"steps": 0}, "steps is 0; give an integer of at least 1"),
        ({"smoothness": math.nan}, "smoothness is nan"),
        ({"matching": {"loss": 0.1, "noise": [], "pruning": [0.5]}}, "matching.noise is"),
        ({"matching": {"loss": 0.1, "noise": [1.0], "pruning": [1.0]}}, "matching.pruning is"),
        ({"tasks": [{**STUDY["tasks"][0], "data": "cifar"}]}, "data 'cifar'"),
        ({"tasks": [{**STUDY["tasks"][0], "attack": "guess"}]}, "attack 'guess'"),
        ({"tasks": [{**STUDY["tasks"][0], "size": 9}]}, "size 9; give 8"),
        ({"tasks": []}, "tasks is empty"),
        ({"controls": {"noise for magic": "none"}}, "controls names 'noise for magic'"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        inversion.check({**small(), **change})
    assert "\n" not in str(error.value)


def test_the_study_that_ships_is_sound_and_paired():
    inversion.check(STUDY)
    assert STUDY["seeds"] >= 20
    assert STUDY["decision"]["control"] in STUDY["arms"]
    assert len({job.name for job in inversion.jobs(STUDY)}) == len(STUDY["tasks"])
