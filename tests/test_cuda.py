"""The laws that only a CUDA device can show; `tests/test_devices.py` has what shows without one."""

import contextlib
from functools import partial

import pytest
import torch
from helpers import assert_same, leaves, make_state, members, mlp
from table import CASES, IDS
from torch.utils._pytree import tree_map

import biofunc as bf

if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)

pytestmark = pytest.mark.cuda
every_case = pytest.mark.parametrize(("row", "settings"), CASES, ids=IDS)

DEVICE = torch.device("cuda", 0)
# Bounds set in advance, not yet by a run: sums run in another order, exp, log, erfc and roots are another library's
DEVICE_ULPS = 64
# A fused kernel may join a multiplication and an addition, besides
COMPILED_ULPS = 64


def moved(tree, device=DEVICE):
    return tree_map(lambda leaf: leaf.to(device), tree)


@contextlib.contextmanager
def no_waiting():
    """Every operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


DRAWS = {
    **{
        f"uniform {dtype}": partial(bf.random.uniform, shape=(4099,), dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    **{
        f"normal {dtype}": partial(bf.random.normal, shape=(4099,), dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    **{
        f"rademacher {dtype}": partial(bf.random.rademacher, shape=(1001,), dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    },
    "bernoulli": partial(bf.random.bernoulli, p=0.3, shape=(1001,)),
    "split": partial(bf.random.split, num=7),
    "fold_in an integer": lambda key: bf.random.fold_in(key, 2**40 + 5),
    "fold_in a name": lambda key: bf.random.fold_in(key, "fc1.weight"),
    "fold_in a tensor": lambda key: bf.random.fold_in(key, key[..., 0]),
}
EXECUTIONS = {
    "eager": lambda draw, keys: torch.stack([draw(key) for key in keys]),
    "vmapped": lambda draw, keys: torch.vmap(draw)(keys),
    "compiled": lambda draw, keys: torch.stack([torch.compile(draw, fullgraph=True)(key) for key in keys]),
    "vmapped and compiled": lambda draw, keys: torch.compile(torch.vmap(draw), fullgraph=True)(keys),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("execute", EXECUTIONS.values(), ids=EXECUTIONS)
def test_draws_are_those_of_the_cpu_bit_for_bit(fresh_compiler, draw, execute):
    keys = bf.random.key(torch.tensor([0, 1, -7, 2**62]))
    keys[2, 1] = 2**40 - 3  # a counter that crosses its low word
    there = execute(draw, keys.to(DEVICE))
    assert there.device == DEVICE
    assert torch.equal(there.cpu(), torch.stack([draw(key) for key in keys]))


def test_many_draws_are_those_of_the_cpu_bit_for_bit():
    key = bf.random.key(3)
    for draw in (bf.random.uniform, bf.random.normal):
        assert torch.equal(draw(key.to(DEVICE), (10_000_001,)).cpu(), draw(key, (10_000_001,)))


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_and_results_live_where_the_parameters_do(row, settings, dtype):
    params, grads = moved(mlp(dtype=dtype))
    rule = row.make(**settings)
    state = make_state(rule, params)
    new = rule(params, grads, state)
    assert {leaf.device for leaf in leaves((state, new)).values()} == {DEVICE}
    assert {path: w.dtype for path, w in new[0].items()} == {path: w.dtype for path, w in params.items()}


@every_case
def test_a_rule_does_on_the_device_what_it_does_on_the_cpu(row, settings):
    params, grads = mlp(dtype=torch.float64)
    rule = row.make(**settings)
    here = (params, grads, make_state(rule, params))
    there = (*moved((params, grads)), make_state(rule, moved(params)))
    for _ in range(3):
        here, there = rule(here[0], grads, here[2]), rule(there[0], moved(grads), there[2])
        assert_same(moved(there, "cpu"), here, ulps=DEVICE_ULPS)


@every_case
def test_a_step_never_makes_the_host_wait(row, settings):
    params, grads = moved(mlp())
    rule = row.make(**settings)
    params, _, state = rule(params, grads, make_state(rule, params))  # fills what is kept per device
    with no_waiting():
        rule(params, grads, state)


@every_case
def test_a_step_of_an_ensemble_never_makes_the_host_wait(row, settings):
    params, grads, keys = moved(members(3))
    rule = row.make(**settings)
    state = torch.vmap(partial(make_state, rule))(params, keys)
    step = torch.vmap(rule)
    params, _, state = step(params, grads, state)
    with no_waiting():
        step(params, grads, state)


@every_case
def test_cuda_graphs_equal_eager(fresh_compiler, row, settings):
    params, grads, keys = moved(members(3))
    rule = row.make(**settings)
    state = torch.vmap(partial(make_state, rule))(params, keys)
    assert_graphs_equal_eager(rule, params, grads, state)


ALL = (
    bf.crystallize,
    bf.temporal_learning_rates,
    bf.adam(),
    bf.volume_dependent_lr,
    partial(bf.fuzzy_learning_rates, nu=0.16),
    bf.descend(bf.schedules.cosine(0.1, 0.0, 100)),
    bf.every(2, bf.rejuvenate_weights),
    bf.every(3, bf.rejuvenate_weights_lognormal),
    bf.enforce_dales_principle,
)


def test_a_step_of_a_chain_of_all_never_makes_the_host_wait():
    params, grads = moved(mlp())
    learn = bf.chain(*ALL)
    state = learn.init(params, bf.random.key(0))
    params, _, state = learn(params, grads, state)
    with no_waiting():
        for _ in range(6):  # both periodic rules fire and rest
            params, _, state = learn(params, grads, state)


def test_cuda_graphs_of_a_chain_of_all_equal_eager(fresh_compiler):
    params, grads, keys = moved(members(3))
    learn = bf.chain(*ALL)
    state = torch.vmap(learn.init)(params, keys)
    assert_graphs_equal_eager(lambda p, g, s: learn(p, g, s), params, grads, state)


def assert_graphs_equal_eager(rule, params, grads, state):
    """Each step starts from the eager one's result, so that a difference of one step is not that of five."""
    compiled = torch.compile(torch.vmap(rule), mode="reduce-overhead", fullgraph=True)
    now = (params, grads, state)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        graph = tree_map(torch.clone, compiled(now[0], grads, now[2]))  # the next replay overwrites its outputs
        now = torch.vmap(rule)(now[0], grads, now[2])
        assert_same(graph, now, ulps=COMPILED_ULPS)
