"""The laws of DESIGN: every rule passes all that apply."""

import copy
import functools
import inspect
import io

import hypothesis
import oracles
import pytest
import torch
from helpers import assert_same, leaves, make_state, members, mlp, param_trees
from hypothesis import strategies as st
from table import CASES, IDS, NOT_RULES, TABLE
from torch._dynamo.testing import CompileCounterWithBackend

import biofunc as bf
from biofunc.rule import Rule, as_rule

every_case = pytest.mark.parametrize(("row", "settings"), CASES, ids=IDS)
every_rule = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)

# vmap sums a leaf in another order than a single run does; the leaves here have at most 30 elements.
REDUCTION_ULPS = 8
partial_nu_0 = functools.partial(bf.fuzzy_learning_rates, nu=0)
# A compiled kernel may fuse a multiplication with an addition, and has an exp and a power of its own.
COMPILED_ULPS = 32


def run(row, settings, params, grads, state, steps=1):
    rule = row.make(**settings)
    for _ in range(steps):
        params, grads, state = rule(params, grads, state)
    return params, grads, state


def test_every_exported_rule_has_a_row():
    exported = {name for name in bf.__all__ if inspect.isfunction(getattr(bf, name))}
    assert exported - NOT_RULES == set(TABLE)


@every_rule
def test_first_three_parameters_are_params_grads_state(row):
    given = getattr(bf, row.given)
    if hasattr(given, "rule"):  # a mechanism; optimizers and descend are called to make their rule
        parameters = inspect.signature(given).parameters
        assert list(parameters)[:3] == ["params", "grads", "state"]
        assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])
        assert not {"noise", "name"} & set(parameters)
    assert isinstance(row.make(), Rule)


@every_rule
def test_docstring_has_the_heads_of_the_contract(row):
    text = inspect.getdoc(getattr(bf, row.given))
    for head in ("Args:", "Returns:", "Raises:", "Phase:"):
        assert head in text
    if as_rule(row.make()).draws:
        assert "Noise:" in text


@every_case
def test_inputs_stay_as_they_are(row, settings):
    params, grads = mlp()
    state = make_state(row.make(**settings), params)
    before = copy.deepcopy((params, grads, state))
    run(row, settings, params, grads, state, steps=2)
    assert_same((params, grads, state), before)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_structure_shape_and_dtype_are_kept(row, settings, dtype):
    params, grads = mlp(dtype=dtype)
    state = make_state(row.make(**settings), params)
    new_params, new_grads, _ = run(row, settings, params, grads, state)
    for old, new in ((params, new_params), (grads, new_grads)):
        assert list(old) == list(new)
        assert [(w.shape, w.dtype, w.device) for w in old.values()] == [
            (w.shape, w.dtype, w.device) for w in new.values()
        ]


@every_rule
def test_accumulators_of_half_precision_are_float32(row):
    params, grads = mlp(dtype=torch.bfloat16)
    state = make_state(row.make(), params)
    _, _, state = run(row, {}, params, grads, state)
    assert {leaf.dtype for leaf in leaves(state).values()} <= {torch.float32, torch.int64}


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vmapped_double_hyperparameter_promotes_nothing(row, dtype):
    params, grads = mlp(dtype=dtype)
    state = make_state(row.make(), params)
    for name in row.at_step:
        value = torch.tensor([0.5, 0.25], dtype=torch.float64)
        apply = torch.vmap(lambda v, name=name: as_rule(row.make()).bind(**{name: v})(params, grads, state))
        new_params, new_grads, new_state = apply(value)
        assert {w.dtype for w in [*new_params.values(), *new_grads.values()]} == {dtype}
        assert {path: w.dtype for path, w in leaves(new_state).items()} == {
            p: w.dtype for p, w in leaves(state).items()
        }


@every_case
def test_state_of_seeds_that_share_their_parameters_is_contiguous_from_init_on(row, settings):
    params, _ = mlp()
    rule = row.make(**settings)
    state = torch.vmap(lambda key: make_state(rule, params, key))(bf.random.key(torch.arange(3)))
    assert all(leaf.is_contiguous() for leaf in leaves(state).values())


@every_case
def test_everything_stays_on_the_device_of_its_leaf(row, settings):
    """The meta device refuses to mix with the CPU, so it stands for any other device; the key follows the leaves."""
    params, grads = [{path: leaf.to("meta") for path, leaf in tree.items()} for tree in mlp()]
    rule = row.make(**settings)
    state = make_state(rule, params)
    _, _, new = rule(params, grads, state)
    assert {leaf.device.type for leaf in leaves(new).values()} == {"meta"}
    params, grads = [
        {path: leaf.to("meta") if "fc2" in path else leaf for path, leaf in tree.items()} for tree in mlp()
    ]
    new_params, new_grads, _ = rule(params, grads, make_state(rule, params))
    for path, leaf in params.items():
        assert new_params[path].device == new_grads[path].device == leaf.device


@every_case
def test_state_is_a_fixed_point_in_structure_stride_and_dtype(row, settings):
    params, grads = mlp()
    state = make_state(row.make(**settings), params)
    _, _, new = run(row, settings, params, grads, state)
    old, new = leaves(state), leaves(new)
    assert list(old) == list(new)
    assert [(w.shape, w.stride(), w.dtype) for w in old.values()] == [
        (w.shape, w.stride(), w.dtype) for w in new.values()
    ]


@every_case
def test_state_of_an_ensemble_is_contiguous_from_init_on(row, settings):
    params, grads, keys = members(3)
    rule = row.make(**settings)
    state = torch.vmap(lambda p, k: make_state(rule, p, k))(params, keys)
    _, _, new = torch.vmap(rule)(params, grads, state)
    assert all(leaf.is_contiguous() for leaf in [*leaves(state).values(), *leaves(new).values()])


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.off is not None], ids=lambda row: row.given)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@hypothesis.given(seed=st.integers(0, 2**31))
def test_off_setting_is_the_identity(row, dtype, seed):
    params, grads = mlp(seed, dtype)
    rule = row.make(**row.off)
    state = make_state(rule, params)
    new_params, new_grads, new_state = rule(params, grads, state)
    assert_same((params, grads, state.plasticity), (new_params, new_grads, new_state.plasticity))


@every_case
@pytest.mark.parametrize("count", [1, 3])
def test_loop_equals_vmap_for_any_size_of_the_ensemble(row, settings, count):
    params, grads, keys = members(count)
    rule = row.make(**settings)

    def three_steps(p, g, key):
        state = make_state(rule, p, key)
        for _ in range(3):
            p, _, state = rule(p, g, state)
        return p, rule(p, g, state)[1], state

    together = bf.ensemble.unstack(torch.vmap(three_steps)(params, grads, keys))
    alone = [three_steps(*member) for member in bf.ensemble.unstack((params, grads, keys))]
    for left, right in zip(together, alone, strict=True):
        assert_same(left, right, ulps=REDUCTION_ULPS if row.reduces else 0)


@every_case
def test_compiled_equals_eager_and_compiles_once(row, settings):
    torch._dynamo.reset()
    params, grads, keys = members(2)
    rule = row.make(**settings)
    state = torch.vmap(lambda p, k: make_state(rule, p, k))(params, keys)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.vmap(rule), backend=counter, fullgraph=True)
    eager_result, compiled_result = (params, grads, state), (params, grads, state)
    for _ in range(3):
        eager_result = torch.vmap(rule)(eager_result[0], grads, eager_result[2])
        compiled_result = compiled(compiled_result[0], grads, compiled_result[2])
        assert_same(eager_result, compiled_result, ulps=COMPILED_ULPS)
    assert counter.frame_count == 1


@every_rule
def test_float_equals_tensor_equals_constant_schedule(row):
    params, grads = mlp()
    for name in row.at_step:
        value = 0.5
        ways = [value, torch.tensor(value), bf.schedules.constant(value), lambda step: value]  # noqa: B023
        results = [run(row, {name: way}, params, grads, make_state(row.make(), params)) for way in ways]
        for result in results[1:]:
            assert_same(results[0], result, ulps=2)  # 1 - beta is rounded to float32 earlier when beta is a tensor


@every_case
def test_unselected_leaves_come_back_as_the_same_objects(row, settings):
    params, grads = mlp()
    rule = bf.where("fc1.weight", row.make(**settings))
    state = make_state(rule, params, where="fc1.weight")
    new_params, new_grads, new_state = rule(params, grads, state)
    for path in ("fc1.bias", "fc2.weight", "fc2.bias"):
        assert new_params[path] is params[path]
        assert new_grads[path] is grads[path]
        assert not any(path in key for key in leaves(new_state))


@every_case
def test_leaves_that_are_no_synapses_are_left_alone(row, settings):
    params, grads = mlp()
    rule = row.make(**settings)
    state = make_state(rule, params)
    new_params, new_grads, _ = rule(params, grads, state)
    if not rule.every_leaf:
        assert new_params["fc1.bias"] is params["fc1.bias"]
        assert new_grads["fc2.bias"] is grads["fc2.bias"]


@every_case
def test_trees_without_leaves_pass(row, settings):
    rule = row.make(**settings)
    for empty in ({}, (), {"a": (), "b": {}}):
        state = make_state(rule, empty)
        assert rule(empty, empty, state)[:2] == (empty, empty)


@every_case
def test_order_of_dict_keys_is_kept_and_means_nothing(row, settings):
    params, grads = mlp()
    backwards = {path: params[path] for path in reversed(list(params))}
    rule = row.make(**settings)
    forward = rule(params, grads, make_state(rule, params))
    backward = rule(backwards, grads, make_state(rule, backwards))
    assert list(backward[0]) == list(backwards)
    assert_same(forward[:2], backward[:2])


@every_case
def test_same_key_same_result_other_key_other_result(row, settings):
    params, grads = mlp()
    rule = row.make(**settings)
    first, again, other = [rule(params, grads, make_state(rule, params, bf.random.key(s))) for s in (1, 1, 2)]
    assert_same(first, again)
    random = rule.draws or row.given == "fuzzy_learning_rates" or settings.get("sign") == "drawn"
    seen = [leaves((params, grads, state.plasticity)) for params, grads, state in (first, other)]
    changed = any(not torch.equal(seen[0][path], seen[1][path]) for path in seen[0])
    assert changed == random


@every_rule
def test_a_rule_alone_moves_the_key_on_exactly_when_it_draws(row):
    params, grads = mlp()
    rule = row.make()
    state = make_state(rule, params)
    _, _, new = rule(params, grads, state)
    assert torch.equal(new.key, state.key) != rule.draws
    assert torch.equal(new.step, state.step)


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.make().draws], ids=lambda row: row.given)
def test_other_rules_of_the_chain_do_not_change_the_noise(row):
    params, grads = mlp()

    @bf.rule(phase="weights")
    def noisy(params, grads, state, *, noise):
        noise.draw(params, "normal")
        return params, grads, state

    rule = row.make()
    results = []
    apply = [partial_nu_0] if rule.writes_rates else []
    for rules in ([rule, *apply], [rule, *apply, noisy]):
        learn = bf.chain(*rules)
        new_params, new_grads, state = learn(params, grads, learn.init(params, bf.random.key(3)))
        results.append((new_params, {} if apply else new_grads, state.plasticity))
    new_params, new_grads, state = rule(params, grads, make_state(rule, params, bf.random.key(3)))
    alone = (new_params, {} if apply else new_grads, state.plasticity)
    assert_same(results[0], results[1])
    assert_same(results[0], alone)


@every_case
def test_saved_and_resumed_equals_uninterrupted(row, settings):
    params, grads = mlp()
    rule = row.make(**settings)
    learn = bf.chain(
        *([] if rule.applies_rates or not rule.writes_rates else [functools.partial(bf.fuzzy_learning_rates, nu=0)]),
        rule,
    )
    state = learn.init(params, bf.random.key(5))
    straight = (params, grads, state)
    for _ in range(4):
        straight = learn(straight[0], grads, straight[2])
    halfway = (params, grads, state)
    for _ in range(2):
        halfway = learn(halfway[0], grads, halfway[2])
    file = io.BytesIO()
    torch.save((halfway[0], halfway[2]), file)
    file.seek(0)
    resumed_params, resumed_state = torch.load(file, weights_only=True)
    for _ in range(2):
        resumed_params, resumed_grads, resumed_state = learn(resumed_params, grads, resumed_state)
    assert_same((resumed_params, resumed_grads, resumed_state), straight)


@every_rule
def test_a_wrong_tree_shape_or_dtype_is_named_by_its_path(row):
    params, grads = mlp()
    rule = row.make()
    state = make_state(rule, params)
    wrong = [
        (KeyError, "fc2.weight", params, {p: g for p, g in grads.items() if p != "fc2.weight"}),
        (KeyError, "extra", params, {**grads, "extra": grads["fc1.bias"]}),
        (ValueError, r"fc1.weight.*\(2, 2\).*\(5, 6\)", params, {**grads, "fc1.weight": torch.zeros(2, 2)}),
        (TypeError, r"fc1.weight.*float64.*float32", params, {**grads, "fc1.weight": grads["fc1.weight"].double()}),
        (TypeError, r"fc1.weight.*float", params, {**grads, "fc1.weight": 0.5}),
        (TypeError, r"fc1.bias.*int64", {**params, "fc1.bias": torch.zeros(5, dtype=torch.int64)}, grads),
        (TypeError, r"fc1.bias.*complex64", {**params, "fc1.bias": torch.zeros(5, dtype=torch.complex64)}, grads),
    ]
    for error, message, bad_params, bad_grads in wrong:
        with pytest.raises(error, match=message):
            rule(bad_params, bad_grads, state)
    without = [{path: leaf for path, leaf in tree.items() if path != "fc2.weight"} for tree in (params, grads)]
    with pytest.raises(KeyError, match=r"with a leaf 'fc2.weight' that params lacks.*another model"):
        rule(*without, state)
    with pytest.raises(KeyError, match=r"without the leaf 'fc2.weight' of params.*another model"):
        rule(params, grads, make_state(rule, without[0]))
    with pytest.raises(ValueError, match=r"fc1.bias.*\(2, 5\).*\(5,\).*torch.vmap"):
        rule(*bf.ensemble.stack([(params, grads)] * 2), state)


@every_rule
def test_numbers_out_of_range_are_named_with_value_and_range(row):
    rule = row.make()
    for name, interval in rule.ranges.items():
        for value in (-1.0, float("nan"), True, "0.5", 1 + 2j):
            with pytest.raises((ValueError, TypeError), match=name):
                rule.bind(**{name: value})
        with pytest.raises(
            ValueError, match=r"-1\.0.*" + interval.text.replace("(", r"\(").replace("[", r"\[").replace(")", r"\)")
        ):
            rule.bind(**{name: -1.0})
    with pytest.raises(TypeError, match="no keyword 'dampning'"):
        rule.bind(dampning=0.5)


@every_rule
def test_a_schedule_out_of_range_is_caught_when_it_gives_a_number(row):
    params, grads = mlp()
    state = make_state(row.make(), params)
    for name in row.at_step:
        with pytest.raises(ValueError, match=f"{name} is -3"):
            as_rule(row.make()).bind(**{name: lambda step: -3.0})(params, grads, state)


@every_case
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["params", "grads"])
def test_a_broken_synapse_spoils_no_other(row, settings, broken, where):
    params, grads = mlp(dtype=torch.float64)
    params["fc1.weight"][2, 3] = broken if where == "params" else 0.5
    grads["fc1.weight"][2, 3] = broken if where == "grads" else 0.5
    rule = row.make(**settings)
    new_params, new_grads, state = run(row, settings, params, grads, make_state(rule, params))
    for path, leaf in leaves((new_params, new_grads, state)).items():
        if leaf.shape == (5, 6):
            rest = torch.ones(5, 6, dtype=torch.bool)
            rest[2, 3] = False
            assert leaf[rest].isfinite().all(), path
        else:
            assert leaf.isfinite().all(), path
    if where == "params" and not rule.redraws and rule.phase not in ("descend", "weights"):
        assert torch.equal(torch.nan_to_num(new_params["fc1.weight"]), torch.nan_to_num(params["fc1.weight"]))


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.smooth], ids=lambda row: row.given)
def test_differentiable_in_the_hyperparameters(row):
    params, grads = mlp(dtype=torch.float64)
    grads = {path: g + 0.3 for path, g in grads.items()}  # Adam's root has no derivative at 0
    state = make_state(row.make(), params)

    def outcome(*numbers):
        p, g, s = run(row, dict(zip(row.smooth, numbers, strict=True)), params, grads, state, steps=2)
        return sum((leaf * leaf).sum() for leaf in [*p.values(), *g.values(), *s.plasticity.values()])

    numbers = [torch.tensor(0.3 + 0.1 * i, dtype=torch.float64, requires_grad=True) for i in range(len(row.smooth))]
    assert torch.autograd.gradcheck(outcome, numbers)


@pytest.mark.parametrize("given", ["volume_dependent_lr", "adam", "adamw", "sgd", "descend", "fuzzy_learning_rates"])
def test_differentiable_in_weights_and_gradients(given):
    row = TABLE[given]
    params, grads = mlp(dtype=torch.float64)
    params = {path: w + 0.01 for path, w in params.items()}  # |w| has no derivative at 0
    grads = {path: g + 0.3 for path, g in grads.items()}
    state = make_state(row.make(), params)

    def outcome(w, g):
        p, d, _ = run(row, {}, {**params, "fc1.weight": w}, {**grads, "fc1.weight": g}, state)
        return p["fc1.weight"], d["fc1.weight"]

    w, g = [tree["fc1.weight"].clone().requires_grad_() for tree in (params, grads)]
    assert torch.autograd.gradcheck(outcome, (w, g))


@every_case
def test_module_parameters_do_not_chain_their_graphs(row, settings):
    params, grads = mlp()
    params = {path: torch.nn.Parameter(w) for path, w in params.items()}
    new_params, _, _ = run(row, settings, params, grads, make_state(row.make(**settings), params))
    assert all(new is params[path] or not new.requires_grad for path, new in new_params.items())


@every_case
@hypothesis.given(tree=param_trees(), seed=st.integers(0, 2**31))
def test_equals_the_scalar_loop(row, settings, tree, seed):
    """Twice, in float64: the second step meets the memory of the first."""
    params, grads = tree
    rule = row.make(**settings)
    state = make_state(rule, params, bf.random.key(seed))
    for _ in range(2):
        new_params, new_grads, new_state = rule(params, grads, state)
        for path, w in leaves(params).items():
            g, rate = leaves(grads)[path], state.plasticity.get(path)
            if rate is None and not rule.every_leaf:
                assert leaves(new_params)[path] is w
                continue
            memory, draws = remembered(rule, state, path, w), drawing(rule, state, path)
            expected_w, expected_g, expected = row.oracle(
                w.flatten().tolist(), g.flatten().tolist(), memory, draws, **settings
            )
            assert_close(leaves(new_params)[path], expected_w)
            assert_close(leaves(new_grads)[path], expected_g)
            if rate is not None:
                assert_close(new_state.plasticity[path].expand(w.shape), expected["rate"])
            if path in state.activity:
                assert_close(new_state.activity[path], expected["activity"])
                assert_close(new_state.slots[rule.name]["count"][path], expected["count"])
            for entry in rule.fresh:
                kept = new_state.slots[rule.name][entry][path]
                assert_close(kept, expected[entry])
        params, state = new_params, new_state


@hypothesis.given(tree=param_trees(), seed=st.integers(0, 2**31), nu=st.floats(0.01, 0.99))
def test_fuzzy_rates_are_drawn_as_the_scalar_loop_draws_them(tree, seed, nu):
    params, _ = tree
    key = bf.random.key(seed)
    state = bf.init(params, key, functools.partial(bf.fuzzy_learning_rates, nu=nu))
    for path, rate in state.plasticity.items():
        leaf_key = bf.random.fold_in(bf.random.fold_in(bf.random.fold_in(key, "fuzzy_learning_rates"), "init"), path)
        uniforms = bf.random.uniform(leaf_key, rate.shape).double().flatten().tolist()
        assert_close(rate, oracles.fuzzy_rates(uniforms, nu))
        assert torch.equal(rate, state.slots["fuzzy_learning_rates"]["innate"][path])


def remembered(rule, state, path, w):
    rate = state.plasticity.get(path, torch.ones(()))
    innate = state.innate(path)
    slot = state.slots.get(rule.name, {})
    return {
        "rate": rate.expand(w.shape).flatten().tolist(),
        "shape": tuple(w.shape),
        "polarity": state.polarity[path].expand(w.shape).flatten().tolist() if path in state.polarity else None,
        "activity": state.activity[path].tolist() if path in state.activity else None,
        "rate_is_shared": rate.shape != w.shape,
        "innate": None if innate is None else innate.flatten().tolist(),
        **{entry: kept[path].flatten().tolist() for entry, kept in slot.items() if entry != "innate" and path in kept},
    }


def drawing(rule, state, path):
    """Draws of a leaf as the contract defines them: kind after kind, each from a fresh block of four words on."""
    key = bf.random.fold_in(bf.random.fold_in(bf.random.fold_in(state.key, rule.name), state.step), path)

    def draws(count, *kinds):
        result, block = [], 0
        for kind in kinds:
            size = 1 if kind == "coin" else count
            stream = torch.stack([key[0], key[1] + block])
            draw = bf.random.normal if kind == "normal" else bf.random.uniform
            result.append(draw(stream, (size,)).double().tolist())
            block += -(-size // 4)
        return result

    return draws


def assert_close(actual, expected):
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=actual.dtype), rtol=1e-11, atol=1e-300)


def test_helpers_compare_what_they_claim():
    """assert_same itself can fail."""
    with pytest.raises(AssertionError):
        assert_same({"a": torch.ones(1)}, {"a": torch.full((1,), 1 + 2**-20)}, ulps=2)
    with pytest.raises(AssertionError):
        assert_same({"a": torch.ones(1)}, {"a": torch.ones(1, dtype=torch.float64)})
