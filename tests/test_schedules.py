"""Schedules: their formulas at integer steps, and as hyperparameters of a chain."""

import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import biofunc as bf
from biofunc import schedules


def linear(step, start, stop, steps):
    return start + (stop - start) * min(step / steps, 1)


def cosine(step, start, stop, steps):
    return stop + (start - stop) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def exponential(step, start, factor, steps):
    return start * factor ** (step / steps)


def piecewise(step, start, values):
    value, latest = start, 0
    for begin, new in values.items():
        if latest < begin <= step:
            value, latest = new, begin
    return value


CASES = {
    "constant": (schedules.constant(0.3), lambda step: 0.3),
    "linear": (schedules.linear(0.1, 0.5, 10), partial(linear, start=0.1, stop=0.5, steps=10)),
    "linear_down": (schedules.linear(0.9, 0.0, 7), partial(linear, start=0.9, stop=0.0, steps=7)),
    "linear_one_step": (schedules.linear(0.9, 0.2, 1), partial(linear, start=0.9, stop=0.2, steps=1)),
    "cosine": (schedules.cosine(0.8, 0.1, 12), partial(cosine, start=0.8, stop=0.1, steps=12)),
    "cosine_up": (schedules.cosine(0.0, 0.7, 5), partial(cosine, start=0.0, stop=0.7, steps=5)),
    "exponential": (schedules.exponential(0.9, 0.5, 4), partial(exponential, start=0.9, factor=0.5, steps=4)),
    "exponential_up": (schedules.exponential(0.1, 1.05, 1), partial(exponential, start=0.1, factor=1.05, steps=1)),
    "piecewise": (
        schedules.piecewise(0.9, {3: 0.5, 8: 0.25}),
        partial(piecewise, start=0.9, values={3: 0.5, 8: 0.25}),
    ),
    "piecewise_unsorted": (
        schedules.piecewise(0.9, {8: 0.25, 3: 0.5, 1: 0.7}),
        partial(piecewise, start=0.9, values={8: 0.25, 3: 0.5, 1: 0.7}),
    ),
    "piecewise_empty": (schedules.piecewise(0.9, {}), partial(piecewise, start=0.9, values={})),
}
each_schedule = pytest.mark.parametrize("name", CASES)


def at(schedule, step):
    return schedule(torch.tensor(step))


def close(a, b, tolerance=1e-14):
    assert float(a) == pytest.approx(float(b), rel=tolerance, abs=tolerance)


# --- the formulas ---


@each_schedule
def test_a_schedule_is_its_formula_at_each_step_and_beyond_its_end(name):
    schedule, formula = CASES[name]
    for step in [*range(30), 1000]:
        close(at(schedule, step), formula(step), 1e-13)


@each_schedule
def test_a_step_may_be_an_int_to_look_at_a_schedule(name):
    schedule = CASES[name][0]
    for step in (0, 3, 1000, 2**62):
        assert torch.equal(schedule(step), at(schedule, step))


@each_schedule
def test_a_schedule_can_be_pickled(name):
    schedule = pickle.loads(pickle.dumps(CASES[name][0]))
    assert torch.equal(at(schedule, 5), at(CASES[name][0], 5))


def test_a_threshold_can_become_infinite():
    schedule = schedules.piecewise(1.0, {2**60 + 1: math.inf})
    assert (at(schedule, 2**60), at(schedule, 2**60 + 1)) == (1, math.inf)
    assert at(schedules.constant(math.inf), 7) == math.inf


@each_schedule
def test_a_value_is_a_float64_scalar_on_the_device_of_the_step(name):
    value = at(CASES[name][0], 3)
    assert (value.dtype, value.shape, value.device) == (torch.float64, torch.Size(), torch.device("cpu"))


@each_schedule
def test_a_schedule_leaves_the_step_as_it_is(name):
    step = torch.tensor(3)
    CASES[name][0](step)
    assert torch.equal(step, torch.tensor(3))


@each_schedule
def test_a_batched_step_gives_the_values_of_its_members(name):
    schedule, _ = CASES[name]
    expected = torch.stack([at(schedule, step) for step in range(25)])
    torch.testing.assert_close(torch.vmap(schedule)(torch.arange(25)), expected, rtol=1e-15, atol=1e-15)


@each_schedule
def test_a_compiled_schedule_is_the_eager_one_and_compiles_once(name):
    torch._dynamo.reset()  # one code object for all cases: they would count as recompilations of each other
    schedule, _ = CASES[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda step: schedule(step), backend=counter, fullgraph=True)
    for step in range(25):
        close(compiled(torch.tensor(step)), at(schedule, step), 1e-15)
    assert counter.frame_count == 1


@given(
    start=st.floats(-10, 10),
    stop=st.floats(-10, 10),
    steps=st.integers(1, 10**6),
    step=st.integers(0, 2 * 10**6),
)
def test_linear_and_cosine_run_from_start_to_stop(start, stop, steps, step):
    for make, formula in ((schedules.linear, linear), (schedules.cosine, cosine)):
        schedule = make(start, stop, steps)
        close(at(schedule, step), formula(step, start, stop, steps), 1e-13)
        close(at(schedule, 0), start)
        close(at(schedule, steps), stop)
        assert torch.equal(at(schedule, steps + step), at(schedule, steps))


@given(
    start=st.floats(0.01, 10),
    factor=st.floats(0.1, 3.0),
    steps=st.integers(1, 1000),
    step=st.integers(0, 10),
)
def test_exponential_multiplies_by_its_factor_over_its_steps(start, factor, steps, step):
    schedule = schedules.exponential(start, factor, steps)
    close(at(schedule, step + steps), factor * at(schedule, step), 1e-12)
    close(at(schedule, step), exponential(step, start, factor, steps), 1e-12)


@given(
    values=st.dictionaries(st.integers(1, 50), st.floats(-1, 1), max_size=5),
    start=st.floats(-1, 1),
    step=st.integers(0, 60),
)
def test_piecewise_holds_the_latest_value_exactly(values, start, step):
    assert float(at(schedules.piecewise(start, values), step)) == piecewise(step, start, values)


# --- errors ---


@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
@pytest.mark.parametrize("steps", [0, -3])
def test_a_course_of_no_steps_is_refused(make, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be at least 1"):
        make(1.0, 0.0, steps)


def test_an_exponential_of_no_steps_or_without_a_positive_factor_is_refused():
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        schedules.exponential(1.0, 0.5, 0)
    for factor in (0.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=f"factor is {factor}; it must be positive"):
            schedules.exponential(1.0, factor, 10)


@pytest.mark.parametrize("step", [0, -1])
def test_piecewise_refuses_a_step_before_the_first(step):
    with pytest.raises(ValueError, match=f"values names step {step}"):
        schedules.piecewise(1.0, {5: 0.1, step: 0.5})


def test_a_hyperparameter_that_acts_at_init_refuses_a_schedule():
    rule = partial(bf.fuzzy_learning_rates, nu=schedules.constant(0.1))
    with pytest.raises(TypeError, match="nu acts at init and takes no schedule"):
        bf.chain(rule, bf.descend(0.1))


def test_a_number_that_a_schedule_returns_is_checked_at_the_step():
    params = {"w": torch.ones(2, 2)}
    learn = bf.chain(bf.descend(lambda step: -1.0))
    state = learn.init(params, bf.random.key(0))
    with pytest.raises(ValueError, match=r"lr is -1\.0; it must lie in \[0, inf\)"):
        learn(params, params, state)


# --- in a chain ---

WEIGHTS = {"w": [[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], "b": [0.5, -0.5]}
STEPS = 15


def params_of(dtype=torch.float64):
    return {path: torch.tensor(values, dtype=dtype) for path, values in WEIGHTS.items()}


def directions(step, params):
    return {
        path: bf.random.normal(bf.random.key(100 * step + i), leaf.shape, dtype=leaf.dtype)
        for i, (path, leaf) in enumerate(params.items())
    }


@each_schedule
def test_as_learning_rate_a_schedule_scales_each_step(name):
    schedule, formula = CASES[name]
    params = params_of()
    expected = {path: leaf.flatten().tolist() for path, leaf in params.items()}
    learn = bf.chain(bf.descend(schedule))
    state = learn.init(params, bf.random.key(0))
    for step in range(STEPS):
        grads = directions(step, params)
        params, _, state = learn(params, grads, state)
        for path, values in expected.items():
            slope = grads[path].flatten().tolist()
            expected[path] = [w - formula(step) * g for w, g in zip(values, slope, strict=True)]
    for path, values in expected.items():
        torch.testing.assert_close(
            params[path].flatten(), torch.tensor(values, dtype=torch.float64), rtol=1e-13, atol=1e-13
        )
    assert state.step == STEPS


DAMPING = [name for name in CASES if name != "cosine_up" and name != "linear_down"]  # 0 damps for good


@pytest.mark.parametrize("name", DAMPING)
def test_as_dampening_factor_a_schedule_multiplies_the_rates_of_settled_synapses(name):
    schedule, formula = CASES[name]
    params = params_of()
    rule = partial(bf.crystallize, dampening_factor=schedule, crystal_thresh=2.0)
    learn = bf.chain(rule, partial(bf.fuzzy_learning_rates, nu=0), bf.descend(0.0))
    state = learn.init(params, bf.random.key(0))
    grads = {"w": params["w"].clone(), "b": params["b"].clone()}
    grads["w"][0, 1] = 0.0  # silent: not settled
    rate = 1.0
    for step in range(STEPS):
        _, applied, state = learn(params, grads, state)
        rate = min(rate, rate * formula(step))
        for i, row in enumerate(WEIGHTS["w"]):
            for j, g in enumerate(row):
                silent = (i, j) == (0, 1)
                close(state.plasticity["w"][i, j], 1.0 if silent else rate, 1e-12)
                close(applied["w"][i, j], 0.0 if silent else g * rate, 1e-12)
        assert torch.equal(applied["b"], grads["b"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_schedule_is_the_number(dtype):
    params = params_of(dtype)
    by_number = bf.chain(partial(bf.crystallize, dampening_factor=0.7), bf.fuzzy_learning_rates, bf.descend(0.1))
    by_schedule = bf.chain(
        partial(bf.crystallize, dampening_factor=schedules.constant(0.7)),
        bf.fuzzy_learning_rates,
        bf.descend(schedules.constant(0.1)),
    )
    left = right = params
    states = [learn.init(params, bf.random.key(0)) for learn in (by_number, by_schedule)]
    for step in range(5):
        grads = directions(step, params)
        left, _, states[0] = by_number(left, grads, states[0])
        right, _, states[1] = by_schedule(right, grads, states[1])
    for path, leaf in left.items():
        assert leaf.dtype == right[path].dtype == dtype
        assert torch.equal(leaf, right[path])
        assert not torch.equal(leaf, params[path])


def test_members_at_different_steps_get_the_values_of_their_own_steps():
    params, grads = params_of(), directions(0, params_of())
    learn = bf.chain(bf.descend(schedules.linear(1.0, 0.0, 10)))
    state = learn.init(params, bf.random.key(0))

    def learn_at(step):
        return learn(params, grads, state.replace(step=step))[0]

    together = torch.vmap(learn_at)(torch.arange(15))
    for step in range(15):
        for path, leaf in params.items():
            expected = leaf - linear(step, 1.0, 0.0, 10) * grads[path]
            torch.testing.assert_close(together[path][step], expected, rtol=1e-13, atol=1e-13)


def test_a_compiled_chain_with_schedules_is_the_eager_one():
    learn = bf.chain(
        partial(bf.crystallize, dampening_factor=schedules.piecewise(0.9, {3: 0.5})),
        bf.sgd(momentum=schedules.linear(0.5, 0.9, 6)),
        bf.fuzzy_learning_rates,
        bf.descend(schedules.exponential(0.1, 0.5, 4)),
    )
    compiled = torch.compile(lambda *inputs: learn(*inputs), backend="aot_eager", fullgraph=True)
    params = params_of()
    left = right = (params, learn.init(params, bf.random.key(0)))
    for step in range(8):
        grads = directions(step, params)
        left = learn(left[0], grads, left[1])[::2]
        right = compiled(right[0], grads, right[1])[::2]
    for path in params:
        torch.testing.assert_close(right[0][path], left[0][path], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(right[1].plasticity["w"], left[1].plasticity["w"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_hundred_steps_of_a_cosine_learning_rate_are_compiled_once(dtype):
    learn = bf.chain(bf.adam(), bf.descend(schedules.cosine(0.1, 0.001, 150)))
    counter = CompileCounterWithBackend("aot_eager")

    def step(params, state, grads):
        params, _, state = learn(params, grads, state)
        return params, state

    compiled = torch.compile(lambda *inputs: step(*inputs), backend=counter, fullgraph=True)
    torch._dynamo.reset()  # the two dtypes would count as recompilations of each other
    params = params_of(dtype)
    left = right = (params, learn.init(params, bf.random.key(0)))
    for number in range(200):
        grads = directions(number, params)
        left, right = compiled(*left, grads), step(*right, grads)
        if number == 0:
            first = counter.frame_count
    assert counter.frame_count == first
    if dtype == torch.float32:  # for float64 PyTorch calls its backend twice within the first compilation
        assert first == 1
    assert left[1].step == 200
    for path in params:
        torch.testing.assert_close(left[0][path], right[0][path], rtol=1e-5, atol=1e-5)
