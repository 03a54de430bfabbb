"""Synaptic scaling: the formula as a scalar loop, where activity goes, and what scaling never does to a weight."""

import io
import math
from functools import partial

import pytest
import torch
from helpers import assert_same, leaves, members, mlp, values
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import biofunc as bf
from biofunc.rule import as_rule
from biofunc.scaling import synaptic_scaling

FORMS = ["linear", "quadratic"]
every_form = pytest.mark.parametrize("form", FORMS)


def start(params, **keywords):
    return bf.init(params, bf.random.key(0), partial(synaptic_scaling, **keywords))


def signal(seed=0, dtype=torch.float32):
    return {"fc1.weight": values(seed, (5,), dtype, "a1").abs(), "fc2.weight": values(seed, (4,), dtype, "a2").abs()}


def scale(w, activity, **keywords):
    """One call on one weight, with its state made anew."""
    params = {"w": w}
    return synaptic_scaling(params, params, start(params), activity={"w": activity}, **keywords)[0]["w"]


# --- the formula ---


def oracle(rows, observations, target, rate, decay, form):
    """Weights, mean activities and counts of one leaf after several observations, one number at a time."""
    rows = [list(row) for row in rows]
    mean, count = [0.0] * len(rows), [0] * len(rows)
    for x in observations:
        seen = [math.isfinite(value) for value in x]
        for i in range(len(rows)):
            if seen[i]:
                count[i] += 1
                # decay^(t-s) weighs observation s; this is the same mean, one observation after the other
                mean[i] += (1 - decay) / (1 - decay ** count[i]) * (x[i] - mean[i])
        known = [mean[i] for i in range(len(rows)) if count[i]]
        for i in range(len(rows)):
            if not seen[i]:
                continue
            goal = target[i] if isinstance(target, list) else target
            if goal == "population":
                goal = sum(known) / len(known)
            for j, w in enumerate(rows[i]):
                size = abs(w) if form == "quadratic" else 1.0
                rows[i][j] = w * max(1 + rate * (goal - mean[i]) * size, 0.5)
    return rows, mean, count


@every_form
@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(4, 3), (1, 1), (0, 2), (3, 0), (2, 3, 2), (3, 1, 2, 2)]),
    rate=st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
    decay=st.sampled_from([0.0, 0.5, 0.99]),
    scales=st.sampled_from([1e-3, 1.0, 10.0]),
    kind=st.sampled_from(["number", "tensor", "neurons", "population"]),
    broken=st.sampled_from([None, math.nan, math.inf]),
)
def test_equals_the_scalar_loop(form, seed, shape, rate, decay, scales, kind, broken):
    w = values(seed, shape, torch.float64)
    observations = [scales * values(seed, shape[:1], torch.float64, f"x{t}") for t in range(4)]
    if broken is not None and shape[0]:
        observations[1][0] = broken
    goals = values(seed, shape[:1], torch.float64, "goals")
    target = {"number": 0.7, "tensor": torch.tensor(0.7), "neurons": {"w": goals}, "population": "population"}[kind]
    plain = {"number": 0.7, "tensor": float(torch.tensor(0.7)), "neurons": goals.tolist(), "population": "population"}
    params = {"w": w}
    state = start(params)
    for x in observations:
        params, _, state = synaptic_scaling(
            params, params, state, activity={"w": x}, target=target, rate=rate, decay=decay, form=form
        )
    rows, mean, count = oracle(
        w.flatten(1).tolist(), [x.tolist() for x in observations], plain[kind], rate, decay, form
    )
    for actual, expected in [
        (params["w"].flatten(1), rows),
        (state.activity["w"], mean),
        (state.slots["synaptic_scaling"]["count"]["w"], count),
    ]:
        expected = torch.tensor(expected, dtype=torch.float64).reshape(actual.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 0.999999, torch.tensor(0.99), lambda step: 0.9])
def test_the_mean_of_one_observation_is_the_observation(decay):
    params, grads = mlp()
    _, _, state = synaptic_scaling(params, grads, start(params), activity=signal(), decay=decay)
    assert_same(state.activity, signal())


def test_the_mean_is_the_bias_corrected_exponential_one():
    params = {"w": values(0, (4, 3), torch.float64)}
    state, decay = start(params), 0.9
    xs = torch.stack([values(t, (4,), torch.float64) for t in range(6)])
    for x in xs:
        _, _, state = synaptic_scaling(params, params, state, activity={"w": x}, decay=decay)
    weights = decay ** torch.arange(5, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(state.activity["w"], (weights @ xs) / weights.sum(), rtol=1e-12, atol=0)


# --- where the activity goes ---


def converge(target, form="linear", skewed=False):
    """A ReLU layer driven by fixed positive inputs; the mean activity over them, after scaling."""
    x = values(1, (32, 8), torch.float64).abs() + 0.1
    params = {"fc.weight": 0.3 * values(2, (6, 8), torch.float64).abs() + 0.05}
    if skewed:
        params["fc.weight"] = params["fc.weight"] - 0.15  # inhibitory synapses, too
    state = start(params)
    first = params
    for _ in range(2000 if form == "linear" else 5000):  # the quadratic change is small where weights are
        activity = {"fc.weight": torch.relu(x @ params["fc.weight"].T).mean(0)}
        params, _, state = synaptic_scaling(
            params,
            params,
            state,
            activity=activity,
            target=target,
            rate=0.05 if form == "linear" else 0.6,
            decay=0.5,
            form=form,
        )
    return first["fc.weight"], params["fc.weight"], torch.relu(x @ params["fc.weight"].T).mean(0)


@every_form
@pytest.mark.parametrize("skewed", [False, True], ids=["excitatory", "mixed"])
def test_activity_converges_to_a_number(form, skewed):
    w, new, activity = converge(0.8, form, skewed=skewed)
    assert ((w @ torch.ones(8, dtype=torch.float64)) > 0).any()
    driven = activity > 0  # a neuron that never fires cannot be woken by a factor
    assert driven.sum() >= 4
    torch.testing.assert_close(activity[driven], torch.full_like(activity[driven], 0.8), rtol=1e-6, atol=0)
    assert not torch.equal(w, new)


@every_form
def test_activity_converges_to_a_target_per_neuron(form):
    goals = torch.tensor([0.2, 0.5, 1.0, 1.5, 2.0, 0.7], dtype=torch.float64)
    torch.testing.assert_close(converge({"fc.weight": goals}, form)[2], goals, rtol=1e-6, atol=0)


def test_activity_converges_to_that_of_the_population():
    w, _, activity = converge("population")
    assert activity.std() / activity.mean() < 1e-6
    assert 0.1 < activity.mean() < 10
    x = values(1, (32, 8), torch.float64).abs() + 0.1
    assert torch.relu(x @ w.T).mean(0).std() > 0.1  # they differed before


def test_a_schedule_of_the_target_is_that_number():
    params, grads = mlp()
    given = [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64), lambda step: 0.25, lambda step: 0.25]
    results = [synaptic_scaling(params, grads, start(params), activity=signal(), target=t) for t in given]
    results.append(
        synaptic_scaling(
            params,
            grads,
            start(params),
            activity=signal(),
            target={"fc1.weight": 0.25, "fc2.weight": torch.tensor(0.25)},
        )
    )
    for result in results[1:]:
        assert_same(results[0], result)


# --- what stays ---


@given(seed=st.integers(0, 2**31), rate=st.floats(1e-4, 0.2))
def test_linear_scaling_keeps_ratios_and_ranks_of_a_neurons_inputs(seed, rate):
    w = values(seed, (6, 9))
    w = torch.where(w == 0, 0.5, w)
    params, state = {"w": w}, start({"w": w})
    for t in range(50):
        activity = {"w": values(seed + t, (6,), name="x").abs()}
        params, _, state = synaptic_scaling(params, params, state, activity=activity, target=0.5, rate=rate)
    new = params["w"].double()
    before = (w / w[:, :1]).double()
    # 50 float32 products, each rounded by at most 2^-24 in both terms of the ratio; the next test is about one call
    torch.testing.assert_close(new / new[:, :1], before, rtol=50 * 2**-23, atol=0)
    assert torch.equal(new.sign(), w.double().sign())


@given(seed=st.integers(0, 2**31), rate=st.floats(1e-4, 1.0))
def test_ratios_and_ranks_are_unchanged_to_a_millionth_in_one_call_and_exact_in_double(seed, rate):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        w = values(seed, (6, 9), dtype)
        w[:, 0] = 1.0
        new = scale(w, values(seed, (6,), dtype, "x").abs(), rate=rate, target=0.5)
        torch.testing.assert_close(new / new[:, :1], w / w[:, :1], rtol=tolerance, atol=0)
        assert (new.gather(1, w.argsort(1)).diff(dim=1) >= 0).all()


@given(seed=st.integers(0, 2**31))
def test_quadratic_scaling_keeps_ranks_while_the_change_is_small(seed):
    """d/dw of w + c w |w| is positive while c |w| > -1/2: it holds for any rate below 1 / (2 |w| |error|)."""
    w = values(seed, (6, 9), torch.float64)
    x = values(seed, (6,), torch.float64, "x").abs()
    rate = min(0.49 / (w.abs().max() * (x - 0.5).abs().max()).item(), 1.0)
    new = scale(w, x, rate=rate, target=0.5, form="quadratic")
    assert (new.gather(1, w.argsort(1)).diff(dim=1) >= 0).all()
    change = (new - w)[w != 0] / (w * w.abs())[w != 0]
    expected = (rate * (0.5 - x))[:, None].expand_as(w)[w != 0]
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)


@every_form
@pytest.mark.parametrize("error", [1e-3, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_error_flips_a_sign(form, error, dtype):
    w = values(3, (5, 7), dtype)
    for activity, target in ((error, 0.0), (0.0, error), (-error, error)):
        new = scale(w, torch.full((5,), activity), target=target, rate=1.0, form=form)
        assert torch.equal(new.sign(), w.sign())
        assert not new.isnan().any()
    down = scale(w, torch.full((5,), 1e30), target=0.0, rate=1.0)
    assert torch.equal(down, w / 2)


@every_form
@given(seed=st.integers(0, 2**31), size=st.sampled_from([0.0, 1.0, 1e30, math.inf, math.nan]))
def test_rate_0_is_the_identity_bit_for_bit(form, seed, size):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        w = values(seed, (4, 3), dtype)
        w[0] = torch.tensor([math.nan, math.inf, -0.0])
        new = scale(w, size * torch.ones(4), rate=0.0, form=form)
        assert torch.equal(new.view(torch.uint8), w.view(torch.uint8))


@every_form
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", [0.5, "population"])
def test_a_broken_activity_leaves_its_neuron_and_spoils_no_other(form, broken, target):
    params = {"w": values(0, (5, 6), torch.float64)}
    x = values(1, (5,), torch.float64).abs()
    bad = x.clone()
    bad[2] = broken
    rest = torch.tensor([0, 1, 3, 4])
    run = partial(synaptic_scaling, target=target, rate=0.1, form=form)
    new, _, state = run(params, params, start(params), activity={"w": bad})
    assert torch.equal(new["w"][2], params["w"][2])
    alone = {"w": params["w"][rest]}
    expected, _, _ = run(alone, alone, start(alone), activity={"w": x[rest]})
    torch.testing.assert_close(new["w"][rest], expected["w"], rtol=1e-14, atol=0)
    # it heals: the neuron's next observation is its first
    new, _, state = run(new, params, state, activity={"w": x})
    assert torch.equal(state.activity["w"][2], x[2])
    assert all(leaf.isfinite().all() for leaf in leaves((new, state)).values())


def test_a_target_of_nan_leaves_that_neuron_alone():
    w = values(0, (3, 4))
    goals = {"w": torch.tensor([1.0, math.nan, 1.0])}
    new = scale(w, torch.zeros(3), target=goals, rate=0.1)
    assert torch.equal(new[1], w[1])
    assert torch.equal(new[0], w[0] * 1.1)


def test_other_leaves_come_back_as_the_same_objects():
    params, grads = mlp()
    new, directions, _ = synaptic_scaling(params, grads, start(params), activity=signal())
    assert all(new[path] is params[path] for path in ("fc1.bias", "fc2.bias"))
    assert all(directions[path] is grads[path] for path in grads)


def test_a_neuron_of_a_convolution_is_an_output_channel():
    w = values(0, (3, 2, 3, 3))
    new = scale(w, torch.tensor([0.0, 1.0, 2.0]), target=1.0, rate=0.1)
    for channel, factor in enumerate([1.1, 1.0, 0.9]):
        torch.testing.assert_close(new[channel], factor * w[channel])


@pytest.mark.parametrize("shape", [(), (3,)])
def test_leaves_of_fewer_dimensions_may_be_chosen(shape):
    params = {"g": torch.ones(shape)}
    state = bf.init(params, bf.random.key(0), synaptic_scaling, where="g")
    new, _, _ = synaptic_scaling(params, params, state, activity={"g": torch.zeros(shape)}, target=1.0, rate=0.5)
    assert torch.equal(new["g"], torch.full(shape, 1.5))


# --- dtypes, ensembles, compile, resume ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signal_dtype", [torch.float64, torch.float32])
def test_dtypes_are_kept_and_means_are_float32_at_least(dtype, signal_dtype):
    params, grads = mlp(dtype=dtype)
    state = start(params)
    new, _, state_ = synaptic_scaling(
        params, grads, state, activity=signal(dtype=signal_dtype), target=torch.tensor(0.3, dtype=torch.float64)
    )
    assert {w.dtype for w in new.values()} == {dtype}
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {a.dtype for a in state.activity.values()} == {a.dtype for a in state_.activity.values()} == {expected}
    assert {p: (w.shape, w.stride()) for p, w in leaves(state).items()} == {
        p: (w.shape, w.stride()) for p, w in leaves(state_).items()
    }


@every_form
@pytest.mark.parametrize("target", [0.5, "population"])
def test_vmap_equals_the_loop(form, target):
    params, grads, keys = members(3)
    activity = bf.ensemble.stack([signal(i) for i in range(3)])
    learn = bf.chain(bf.descend(0.1), partial(synaptic_scaling, target=target, rate=0.1, form=form))

    def two_steps(p, g, key, a):
        state = learn.init(p, key)
        for _ in range(2):
            p, _, state = learn(p, g, state, activity=a)
        return p, state

    together = torch.vmap(two_steps)(params, grads, keys, activity)
    alone = [two_steps(*member) for member in bf.ensemble.unstack((params, grads, keys, activity))]
    for left, right in zip(bf.ensemble.unstack(together), alone, strict=True):
        assert_same(left, right, ulps=8 if target == "population" else 0)  # vmap sums the population in another order


def test_hyperparameters_can_be_swept():
    params, grads = mlp()
    rates, targets = torch.tensor([0.0, 0.1], dtype=torch.float64), torch.tensor([0.2, 0.4])

    def run(rate, target):
        return synaptic_scaling(params, grads, start(params), activity=signal(), rate=rate, target=target)[0]

    swept = torch.vmap(run)(rates, targets)
    for i in range(2):
        one = run(rates[i].item(), targets[i])
        assert_same({p: leaf[i] for p, leaf in swept.items()}, one, ulps=2)  # the rate is rounded to float32 earlier


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None)])
def test_state_of_an_ensemble_is_contiguous_from_init_on(in_dims):
    params, _, keys = members(3)
    if in_dims[0] is None:
        params = mlp()[0]
    if in_dims[1] is None:
        keys = keys[0]
    state = torch.vmap(lambda p, k: bf.init(p, k, synaptic_scaling), in_dims=in_dims)(params, keys)
    for path, size in (("fc1.weight", 5), ("fc2.weight", 4)):
        for leaf in (state.activity[path], state.slots["synaptic_scaling"]["count"][path]):
            assert leaf.shape == (3, size)
            assert leaf.is_contiguous()
            assert not leaf.any()


@every_form
@pytest.mark.parametrize(
    "target",
    [0.5, "population", {"fc1.weight": torch.ones(5), "fc2.weight": torch.ones(4)}],
    ids=["0.5", "pop", "dict"],
)
def test_compiled_equals_eager_and_compiles_once(form, target):
    torch._dynamo.reset()
    params, grads, keys = members(2)
    learn = bf.chain(bf.descend(0.1), bf.every(2, partial(synaptic_scaling, target=target, rate=0.1, form=form)))
    state = torch.vmap(learn.init)(params, keys)

    def step(p, g, s, a):
        return learn(p, g, s, activity=a)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.vmap(step), backend=counter, fullgraph=True)
    eager, fast = (params, grads, state), (params, grads, state)
    for t in range(4):
        activity = bf.ensemble.stack([signal(t), signal(t + 9)])
        eager = torch.vmap(step)(eager[0], grads, eager[2], activity)
        fast = compiled(fast[0], grads, fast[2], activity)
        assert_same(eager, fast, ulps=32)
    assert counter.frame_count == 1


def test_a_resumed_run_is_the_uninterrupted_one():
    params, grads = mlp()
    learn = bf.chain(bf.sgd(momentum=0.9), bf.descend(0.1), partial(synaptic_scaling, rate=0.1))

    def run(p, state, steps):
        for t in steps:
            p, _, state = learn(p, grads, state, activity=signal(t))
        return p, state

    state = learn.init(params, bf.random.key(0))
    file = io.BytesIO()
    torch.save(run(params, state, range(3)), file)
    file.seek(0)
    assert_same(run(*torch.load(file, weights_only=True), range(3, 6)), run(params, state, range(6)))


@every_form
def test_differentiable_in_weights_rate_decay_and_target(form):
    params, grads = mlp(dtype=torch.float64)
    state = start(params)
    first, second = signal(0, torch.float64), signal(1, torch.float64)
    second["fc1.weight"][1] = math.nan
    first["fc1.weight"][2] = second["fc1.weight"][2] = math.nan  # never observed

    def outcome(w, rate, decay, target):
        run = partial(synaptic_scaling, rate=rate, decay=decay, target=target, form=form)
        p, _, s = run({**params, "fc1.weight": w}, grads, state, activity=first)
        p, _, s = run(p, grads, s, activity=second)
        return p["fc1.weight"], s.activity["fc1.weight"]

    w = (params["fc1.weight"] + 0.01).requires_grad_()
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.2, 0.7, 0.4)]
    assert torch.autograd.gradcheck(outcome, (w, *numbers))


# --- errors ---


def test_paths_that_the_rule_does_not_act_on_are_ignored():
    params, grads = mlp()
    extra = {**signal(), "head.weight": torch.ones(2)}
    assert_same(
        synaptic_scaling(params, grads, start(params), activity=extra),
        synaptic_scaling(params, grads, start(params), activity=signal()),
    )
    rule = bf.where("fc1.*", synaptic_scaling)
    state = bf.init(params, bf.random.key(0), rule)
    assert list(state.activity) == ["fc1.weight"]
    new, _, _ = rule(params, grads, state, activity={"fc1.weight": torch.ones(5)})
    assert new["fc2.weight"] is params["fc2.weight"]


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (TypeError, r"activity is missing.*learn\(.*activity=activity\).*record_activity", {}),
        (TypeError, "activity is Tensor", {"activity": torch.ones(5)}),
        (KeyError, r"no leaf 'fc2.weight'.*record_activity.*bf.where", {"activity": {"fc1.weight": torch.ones(5)}}),
        (ValueError, r"fc1.weight.*\(6,\).*\(5,\)", {"activity": {**signal(), "fc1.weight": torch.ones(6)}}),
        (ValueError, r"fc1.weight.*\(\).*\(5,\)", {"activity": {**signal(), "fc1.weight": torch.tensor(1.0)}}),
        (ValueError, r"fc2.weight.*\(3, 4\).*\(4,\)", {"activity": {**signal(), "fc2.weight": torch.ones(3, 4)}}),
        (TypeError, r"fc1.weight.*float", {"activity": {**signal(), "fc1.weight": 0.5}}),
        (ValueError, "target is 'mean'.*population", {"activity": signal(), "target": "mean"}),
        (TypeError, "target is True", {"activity": signal(), "target": True}),
        (TypeError, "target is None", {"activity": signal(), "target": None}),
        (ValueError, "target is nan", {"activity": signal(), "target": math.nan}),
        (KeyError, "target.*fc2.weight", {"activity": signal(), "target": {"fc1.weight": 1.0}}),
        (ValueError, r"target.*fc1.weight.*\(4,\).*\(5,\)", {"activity": signal(), "target": torch.ones(4)}),
        (ValueError, r"rate is 1.5.*\[0, 1\]", {"activity": signal(), "rate": 1.5}),
        (ValueError, r"decay is 1.0.*\[0, 1\)", {"activity": signal(), "decay": 1.0}),
        (ValueError, "form is 'cubic'", {"activity": signal(), "form": "cubic"}),
    ],
)
def test_errors_name_what_is_wrong_and_what_to_do(error, message, keywords):
    params, grads = mlp()
    state = start(params)
    with pytest.raises(error, match=message):
        synaptic_scaling(params, grads, state, **keywords)


def test_it_stands_after_descend():
    with pytest.raises(ValueError, match="synaptic_scaling"):
        bf.chain(synaptic_scaling, bf.descend(0.1))
    assert as_rule(synaptic_scaling).phase == "weights"


def test_state_without_the_rule_is_refused():
    params, grads = mlp()
    with pytest.raises(KeyError, match="made without synaptic_scaling"):
        synaptic_scaling(params, grads, bf.init(params, bf.random.key(0)), activity=signal())
