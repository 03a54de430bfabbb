"""Numbers at their limits: half precision, denormals, the largest floats, huge leaves, and steps beyond 2^31."""

import functools
import math
import os
from fractions import Fraction

import pytest
import torch
from helpers import assert_same, leaves, make_state, mlp
from philox_oracle import key_of, oracle_fold_in, oracle_words, pair_of
from table import CASES, IDS, TABLE

import biofunc as bf
from biofunc import BioState, philox, random, schedules
from biofunc.bias_correction import bias_correction
from biofunc.noise import StepKeys
from biofunc.reductions import finite_max, finite_mean, finite_min
from biofunc.rejuvenate import _smallest
from biofunc.rule import as_rule

every_case = pytest.mark.parametrize(("row", "settings"), CASES, ids=IDS)
HALF = [torch.bfloat16, torch.float16]
NUMBER = 10**8

# Half precision


@every_case
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_float32_rounded_once(row, settings, dtype):
    """What a rule makes of half-precision leaves is what it makes of the same numbers in float32, rounded."""
    params, grads = mlp(dtype=dtype)
    rule, signals = row.make(**settings), {}
    if row.given in ("activity_dependent_rates", "synaptic_scaling"):  # the row would sum in half precision
        rule = as_rule(getattr(bf, row.given)).bind(**settings)
        signals = {"activity": {"fc1.weight": torch.linspace(0.2, 2, 5), "fc2.weight": torch.linspace(0, 1, 4)}}
    half = rule(params, grads, make_state(rule, params), **signals)
    wide = [{path: leaf.float() for path, leaf in tree.items()} for tree in (params, grads)]
    full = rule(*wide, make_state(rule, wide[0]), **signals)
    rounded = [{path: leaf.to(dtype) for path, leaf in tree.items()} for tree in full[:2]]
    assert_same(half, (*rounded, full[2]))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_autocast_changes_nothing(row, settings, dtype):
    params, grads = mlp(dtype=dtype)
    rule = row.make(**settings)

    def two_steps():
        state = make_state(rule, params)
        first = rule(params, grads, state)
        return rule(first[0], grads, first[2])

    plain = two_steps()
    for lower in HALF:
        with torch.autocast("cpu", dtype=lower):
            assert_same(two_steps(), plain)


# Extreme numbers


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tree", ["params", "grads"])
def test_extreme_numbers_of_one_synapse_leave_the_others_finite(row, settings, dtype, tree):
    """0, a denormal, the smallest and largest numbers, and what is none; also a leaf that is 0 throughout."""
    limits = torch.finfo(dtype)
    extremes = [0.0, limits.smallest_normal / 4, limits.smallest_normal, limits.max, -limits.max]
    rule = row.make(**settings)
    for value in [*extremes, math.inf, -math.inf, math.nan, None]:
        # Every neuron's mean activity follows a neuron of 1e38; the row hands over the summed size of the weights
        if row.given == "synaptic_scaling" and tree == "params" and value is not None and abs(value) == limits.max:
            continue
        given = dict(zip(("params", "grads"), mlp(dtype=dtype), strict=True))
        if value is None:
            given[tree]["fc1.weight"].zero_()
        else:
            given[tree]["fc1.weight"][2, 3] = value
        params, grads, state = given["params"], given["grads"], make_state(rule, given["params"])
        for _ in range(2):
            params, new_grads, state = rule(params, grads, state)
        for path, leaf in leaves((params, new_grads, state)).items():
            others = torch.ones(leaf.shape, dtype=torch.bool)
            if leaf.shape == (5, 6) and value is not None:
                others[2, 3] = False
            assert leaf[others].isfinite().all(), (path, value)


@every_case
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_leaves_of_no_and_of_one_element_pass(row, settings, shape, dtype):
    params, grads = {"w": torch.full(shape, 0.3, dtype=dtype)}, {"w": torch.full(shape, -0.2, dtype=dtype)}
    rule = row.make(**settings)
    state = make_state(rule, params)
    for _ in range(2):
        params, grads, state = rule(params, grads, state)
        for path, leaf in leaves((params, grads, state)).items():
            assert leaf.isfinite().all(), path
        assert params["w"].shape == grads["w"].shape == shape


# Precision


@pytest.mark.parametrize("decay", [0.0, 1e-30, 0.5, 0.9, 0.999, 1 - 1e-5, 1 - 1e-8, 1 - 2**-52])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_correction_is_precise_at_any_decay(decay, dtype):
    counts = torch.tensor([1, 2, 3, 10, 1000, 2**24], dtype=dtype)
    exact = [-math.expm1(t * math.log(decay)) if decay else 1.0 for t in counts.tolist()]
    actual = bias_correction(decay, counts)
    assert actual.dtype == dtype
    # The logarithm, the product and expm1 round once each, and the error of a large exponent shrinks with its exp
    torch.testing.assert_close(actual, torch.tensor(exact, dtype=dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)
    # A tensor: half an ulp each of the product with the logarithm, of that with the decay and of the difference, and an
    # ulp each of the logarithm, of its rounding and of expm1
    as_tensor = bias_correction(torch.tensor(decay, dtype=torch.float64), counts)
    torch.testing.assert_close(as_tensor, torch.tensor(exact, dtype=dtype), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_compiled_bias_correction_is_precise_too():
    """Inductor takes expm1 for exp minus 1, which left two digits of 1 - 0.99999 in float32."""
    torch._dynamo.reset()
    counts = torch.tensor([1.0, 2.0, 3.0, 10.0, 1000.0, 10_000.0]).repeat(9, 1)  # long enough for vectors
    given = torch.tensor(0.99999)
    exact = [float(1 - Fraction(given.item()) ** t) for t in counts[0].int().tolist()]
    for decay in (given.item(), given):
        actual = torch.compile(lambda t, decay=decay: bias_correction(decay, t), fullgraph=True)(counts)
        expected = torch.tensor(exact).expand_as(actual)
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("decay", [0.0, 1e-30, 1e-8, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_derivative_of_bias_correction_is_that_of_fractions(decay, dtype):
    given = torch.tensor(decay, dtype=dtype)
    shape = (4, 64)
    for t in (1, 2, 3, 10, 100, 1000, 10_000):
        slopes = torch.func.vjp(lambda d, t=t: bias_correction(d, torch.full(shape, t, dtype=dtype)), given)[1]
        one = torch.zeros(shape, dtype=dtype)
        one[3, 5] = 1
        exact = -t * Fraction(given.item()) ** (t - 1) if t < 1000 or decay else 0
        # decay^(t - 1) comes of expm1 plus 1, which is off by an ulp of 1; the slope is t - 1 times it, plus two terms
        # that cancel for a small decay. The roundings of its exponent count as in the value
        eps = torch.finfo(dtype).eps
        assert slopes(one)[0].item() == pytest.approx(float(exact), rel=4 * eps, abs=t * eps if decay else 0)


@pytest.mark.parametrize("beta2", [0.999, 1 - 1e-5, 1 - 1e-8])
def test_first_directions_of_adam_in_float32_have_size_one(beta2):
    """With a gradient that stays, m / sqrt(v) is 1 from the first step on; it was off by 7e-4 at 1 - 1e-5."""
    params, grads = {"w": torch.ones(3, 3)}, {"w": torch.full((3, 3), 0.37)}
    for rules in ([], [bf.rejuvenate_weights]):
        learn = bf.adam(beta2=beta2, eps=0.0)
        state = bf.init(params, random.key(0), learn, *rules)
        for _ in range(3):
            _, directions, state = learn(params, grads, state)
            assert (directions["w"] - 1).abs().max() < 1e-6


def test_a_running_mean_of_activity_is_that_of_float64_near_a_decay_of_1():
    means = []
    for dtype in (torch.float32, torch.float64):
        params = {"w": torch.ones(3, 3, dtype=dtype)}
        rule = functools.partial(bf.synaptic_scaling, decay=1 - 1e-9)
        state = bf.init(params, random.key(0), rule)
        for t in range(1, 4):
            _, _, state = rule(params, params, state, activity={"w": torch.tensor([1.0, 2.0, 3.0]) * t})
        means.append(state.activity["w"])
    torch.testing.assert_close(means[0].double(), means[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(means[1], torch.tensor([2.0, 4.0, 6.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_calls_are_counted_beyond_2_24():
    """In float32 the count would stay at 2^24, which is even: rates would be renewed at each call."""
    params = {"w": torch.ones(2, 3)}
    rule = functools.partial(bf.temporal_learning_rates, decay=1.0, renewal_period=2.0)
    state = bf.init(params, random.key(0), rule)
    state = state.with_slot("temporal_learning_rates", calls={"w": torch.tensor(2**24)})
    renewed = []
    for _ in range(4):
        _, _, new = rule(params, params, state)
        renewed.append(not torch.equal(new.plasticity["w"], state.plasticity["w"]))
        state = new
    assert renewed == [False, True, False, True]
    assert state.slots["temporal_learning_rates"]["calls"]["w"] == 2**24 + 4


@pytest.mark.parametrize("given", ["adam", "adamw"])
def test_adam_goes_on_where_float32_stops_counting(given):
    """A count that stays at 2^24 changes nothing: decay^t is 0 long before."""
    params, grads = mlp()
    learn = TABLE[given].make()
    state = make_state(learn, params)
    counts = [{path: torch.full_like(t, c) for path, t in state.slots[given]["count"].items()} for c in (2**24, 2**23)]
    results = [learn(params, grads, state.with_slot(given, count=count))[1] for count in counts]
    assert_same(*results)


def test_the_number_of_synapses_that_die_is_exact_beyond_2_24():
    number = 2**24 + 9
    values = torch.arange(number, dtype=torch.int32)
    for dies in (2**24 + 1, 2**24 + 3):
        rate = (dies + 0.5) / number
        for coin, expected in ((0.25, dies), (0.75, dies + 1)):
            assert _smallest(values, rate, torch.tensor(coin)).sum() == expected


# 10^8 synapses


def mean_in_float64(values):
    return sum([part.double().sum().item() for part in values.split(10**7)]) / values.numel()


def test_statistics_of_10_8_synapses():
    """torch sums in float32 by cascades: 10^8 numbers cost no digit. 1 GB at the most."""
    key = key_of((11, 2**32 - 10**7))  # its counter carries into the high word
    on = philox.ACCELERATED
    random.accelerate()
    try:
        size = random.normal(key, (NUMBER,)).abs_()
    finally:
        random.accelerate(on)
    for start in (0, 4 * 10**7, NUMBER - 8):  # as drawn, on both sides of the carry and at the end
        seed, offset = pair_of(key)
        words = oracle_words((seed, offset + start // 4), 8)
        expected = philox.to_normal(torch.tensor(words)).abs()
        assert torch.equal(size[start : start + 8], expected)
    assert abs(finite_mean(size).item() / mean_in_float64(size) - 1) < 1e-6
    size += 100  # a mean far from 0 needs more bits
    assert abs(finite_mean(size).item() / mean_in_float64(size) - 1) < 1e-6
    assert finite_max(size) == size.max()
    assert finite_min(size) == size.min()
    size[: 3 * 10**7] = math.nan  # more than float32 counts one by one
    assert abs(finite_mean(size).item() / mean_in_float64(size[3 * 10**7 :]) - 1) < 1e-6


@pytest.mark.skipif("BIOFUNC_LARGE" not in os.environ, reason="10^8 synapses of every rule take minutes and 6 GB")
@every_case
def test_rules_of_10_8_synapses(row, settings):
    """A leaf of 10^8 synapses that repeats one of 10^4 has its statistics, and the draws of its first rows."""
    random.accelerate()
    small = {"w": 0.3 * random.normal(random.key(3), (100, 100))}
    params = {"w": small["w"].repeat(10**2, 10**2)}
    rule = row.make(**settings)
    new_params, new_grads, state = rule(params, params, make_state(rule, params))
    assert all(leaf.isfinite().all() for leaf in leaves((new_params, new_grads, state)).values())
    if not row.reduces:  # a synapse knows of no other: the first rows are those of a leaf that has no more
        first = {"w": params["w"][:100]}
        for new, old in zip((new_params, new_grads), rule(first, first, make_state(rule, first)), strict=False):
            assert torch.equal(new["w"][:100], old["w"])
    few = rule(small, small, make_state(rule, small))
    if rule.draws:
        for new, old in ((new_params, few[0]), (new_grads, few[1])):
            # The mean of 10^4 noisy numbers, to five standard errors of a hundredth of their spread each
            torch.testing.assert_close(new["w"].abs().mean(), old["w"].abs().mean(), rtol=0.1, atol=1e-3)
    elif row.given not in ("fuzzy_learning_rates", "synaptic_scaling") and "dale" not in row.given:
        for new, old in ((new_params, few[0]), (new_grads, few[1]), (state.plasticity, few[2].plasticity)):
            torch.testing.assert_close(new["w"].expand(10**4, 10**4)[-100:, -100:], old["w"].expand(100, 100))


# Counters, steps and keys at their edges

STEPS = [0, 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40, 2**53 + 1, 2**63 - 1]
OFFSETS = [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 3, 2**40, 2**62]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(params=[False, True], ids=["operations", "kernel"])
def executor(request):
    on = philox.ACCELERATED
    random.accelerate(request.param)
    yield
    random.accelerate(on)


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_anywhere_in_a_stream_are_the_oracle(executor, seed):
    """Beyond 2^31 and 2^32, and where the counter wraps at 2^64: 11 numbers are 3 blocks."""
    for offset in [*OFFSETS, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]:
        key, words = key_of((seed, offset)), oracle_words((seed, offset), 11)
        uniforms = [(word & 0xFFFFFF) / 2**24 for word in words]
        assert random.uniform(key, (11,)).tolist() == uniforms
        assert torch.equal(random.normal(key, (11,)), philox.to_normal(torch.tensor(words)))
        assert [s < 0 for s in random.rademacher(key, (11,)).tolist()] == [bool(word >> 23 & 1) for word in words]


def expected_at(pairs, starts, counts):
    return [
        [(word & 0xFFFFFF) / 2**24 for word in oracle_words((seed, offset + start), count)]
        for (seed, offset), start, count in zip(pairs, starts, counts, strict=True)
    ]


def test_ragged_draws_far_into_a_leaf_are_the_oracle(executor):
    """A slice of a leaf far too large to be held, as a shard of it would draw."""
    pairs = [(seed, offset) for seed in SEEDS[::3] for offset in (0, 2**32 - 1, 2**64 - 1)]
    counts = [1 + 5 * i for i in range(len(pairs))]
    for start in OFFSETS:
        starts = [start + i for i in range(len(pairs))]
        drawn = philox.ragged_draws([key_of(pair) for pair in pairs], starts, counts, "uniform")
        assert [values.tolist() for values in drawn] == expected_at(pairs, starts, counts)


def test_compiled_ragged_draws_far_into_a_leaf_are_the_oracle():
    """A start beyond 2^31 is a constant of the compiled code, which must not end up in 32-bit index arithmetic."""
    torch._dynamo.reset()
    pairs, starts, counts = [(5, 0), (2**63, 2**32 - 1)], [2**33 + 3, 2**40], [37, 130]
    draw = torch.compile(lambda *keys: philox.ragged_draws(list(keys), starts, counts, "uniform"), fullgraph=True)
    drawn = draw(*[key_of(pair) for pair in pairs])
    assert [values.tolist() for values in drawn] == expected_at(pairs, starts, counts)


@pytest.mark.parametrize("step", STEPS)
def test_keys_of_late_steps_are_the_oracle(executor, step):
    for pair in [(seed, offset) for seed in SEEDS[::2] for offset in (0, 2**64 - 1)]:
        state = BioState(key=key_of(pair), step=torch.tensor(step))
        keys = StepKeys(state, ["adam", "crystallize"], ["w", "b"])["crystallize"]
        of_step = oracle_fold_in(oracle_fold_in(pair, "crystallize"), step)
        assert pair_of(keys["b"]) == oracle_fold_in(of_step, "b")
        assert pair_of(random.fold_in(key_of(pair), step)) == oracle_fold_in(pair, step)


@pytest.mark.parametrize("step", STEPS[:-2])  # beyond 2^53 a float64 does not hold every step
def test_schedules_and_periods_at_late_steps(step):
    now = torch.tensor(step)
    values = {
        schedules.constant(0.1): 0.1,
        schedules.linear(0.0, 1.0, 2**40): min(step / 2**40, 1.0),
        schedules.cosine(1.0, 0.0, 2**40): (1 + math.cos(math.pi * min(step / 2**40, 1.0))) / 2,
        schedules.exponential(1.0, 0.5, 2**33): 0.5 ** (step / 2**33),
        schedules.piecewise(0.0, {max(step, 1): 1.0, step + 1: 2.0}): float(step > 0),
    }
    for schedule, value in values.items():
        # Cosine and power of torch and of Python may each be an ulp off, all else is exact; pytest would allow 1e-12
        assert schedule(now).item() == pytest.approx(value, rel=2 * 2**-52, abs=0)
    params = {"w": torch.ones(2, 2)}
    for period in (2, 3, 2**31, 2**32):
        learn = bf.chain(bf.every(period, bf.descend(0.5)))
        state = learn.init(params, random.key(0)).replace(step=now)
        moved, _, new = learn(params, params, state)
        assert (moved["w"][0, 0] == 0.5) == ((step + 1) % period == 0)
        assert new.step == step + 1
        both = torch.vmap(lambda s, learn=learn: learn(params, params, s)[0]["w"])(bf.ensemble.stack([state, new]))
        assert [bool(w[0, 0] == 0.5) for w in both] == [(step + i) % period == 0 for i in (1, 2)]


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.make().draws], ids=lambda row: row.given)
def test_noise_of_a_late_step_is_that_of_its_key(row):
    """At 2^32 + 5 a rule sees neither the noise of step 5 nor that of step 2^31 + 5."""
    params, grads = mlp()
    rule = row.make()
    state = make_state(rule, params)
    results = [rule(params, grads, state.replace(step=torch.tensor(step))) for step in (5, 2**31 + 5, 2**32 + 5)]
    seen = [(leaves((p, g))["0/fc1.weight"], leaves((p, g))["1/fc1.weight"], s.plasticity["fc1.weight"])
            for p, g, s in results]  # fmt: skip
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not all(torch.equal(a, b) for a, b in zip(seen[i], seen[j], strict=True)) or row.given.startswith("tem")
