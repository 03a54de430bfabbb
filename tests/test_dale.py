"""Dale's principle: signs as a scalar loop settles them, one sign per presynaptic neuron in every layer, and what it
does to learning, to new synapses and to broken ones."""

import itertools
import math
from functools import partial

import hypothesis
import pytest
import torch
from helpers import assert_same, leaves, members, mlp, param_trees, values
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

import biofunc as bf
from biofunc.dale import enforce_dales_principle as enforce
from biofunc.dale import impose_dales_principle as impose
from biofunc.dale import presynaptic_axes

KEY = bf.random.key(11)
DRAWN = {"sign": "drawn"}
both_rules = pytest.mark.parametrize("rule", [enforce, impose])


def polarity(w, axis="presynaptic", key=KEY, **keywords):
    """Signs of the only leaf, one per weight."""
    return bf.init({"w": w}, key, partial(enforce, axis=axis, **keywords)).polarity["w"].expand(w.shape)


def built(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def applied(rule, w, **keywords):
    state = bf.init({"w": w}, KEY, partial(rule, **keywords))
    return rule({"w": w}, {"w": torch.zeros_like(w)}, state)[0]["w"], state


# The formula as a scalar loop


def neuron_of(index, shape, axis, groups):
    """Number of the presynaptic neuron of a weight: group by group of outputs, channel by channel."""
    if len(shape) < 2:
        return index[0] if index else 0
    return index[0] // (shape[0] // groups) * shape[axis] + index[axis] if groups > 1 else index[axis]


def signs_by_loop(w, uniforms, axis=1, groups=1, sign="majority", fraction=0.8):
    places = list(itertools.product(*[range(n) for n in w.shape]))
    outgoing = {}
    for place in places:
        outgoing.setdefault(neuron_of(place, w.shape, axis, groups), []).append(w[place].item())
    signs = torch.full_like(w, math.nan)
    for place in places:
        neuron = neuron_of(place, w.shape, axis, groups)
        total = math.fsum(x for x in outgoing[neuron] if math.isfinite(x)) if sign == "majority" else 0.0
        drawn = 1.0 if uniforms[neuron] < fraction else -1.0
        signs[place] = drawn if total == 0 else math.copysign(1.0, total)
    return signs


def uniforms_of(w, path, rule, axis=1, groups=1, key=KEY):
    count = (groups * w.shape[axis] if w.dim() > 1 else w.numel()) or 0
    leaf_key = bf.random.fold_in(bf.random.fold_in(bf.random.fold_in(key, rule.rule.name), "init"), path)
    return bf.random.uniform(leaf_key, (count,)).tolist()


def projected_by_loop(w, signs):
    flat = [0.0 if x * s < 0 else x for x, s in zip(w.flatten().tolist(), signs.flatten().tolist(), strict=True)]
    return torch.tensor(flat, dtype=w.dtype).reshape(w.shape)


@st.composite
def grouped_weights(draw):
    """A weight of two to four dimensions, the axis of its presynaptic neurons, and its groups."""
    groups = draw(st.integers(1, 3))
    shape = [groups * draw(st.integers(1, 3)), *[draw(st.integers(1, 3)) for _ in range(draw(st.integers(1, 3)))]]
    axis = draw(st.integers(1 if groups > 1 else 0, len(shape) - 1))
    numbers = st.sampled_from([-2.0, -1.0, 0.0, 0.0, 0.25, 1.0, 2.0])  # exact sums: ties are ties
    w = torch.tensor(draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape))))
    return w.double().reshape(shape), axis, groups


@both_rules
@hypothesis.given(
    case=grouped_weights(), sign=st.sampled_from(["majority", "drawn"]), fraction=st.sampled_from([0.0, 0.3, 0.8, 1.0])
)
def test_equals_the_scalar_loop_on_any_axis_and_in_groups(rule, case, sign, fraction):
    w, axis, groups = case
    new, state = applied(rule, w, axis={"w": (axis, groups)}, sign=sign, fraction_excitatory=fraction)
    signs = signs_by_loop(w, uniforms_of(w, "w", rule, axis, groups), axis, groups, sign, fraction)
    assert torch.equal(state.polarity["w"].expand(w.shape), signs)
    assert torch.equal(new, projected_by_loop(w, signs) if rule is enforce else w.abs() * signs)
    wide = [n if d == axis or (d == 0 and groups > 1) else 1 for d, n in enumerate(w.shape)]
    assert list(state.polarity["w"].shape) == wide


@both_rules
@hypothesis.given(tree=param_trees(), seed=st.integers(0, 2**31))
def test_equals_the_scalar_loop_on_trees(rule, tree, seed):
    params, grads = tree
    key = bf.random.key(seed)
    state = bf.init(params, key, rule)
    new, new_grads, new_state = rule(params, grads, state)
    assert set(state.polarity) == set(state.plasticity)
    for path, w in leaves(params).items():
        if w.dim() < 2:
            assert leaves(new)[path] is w
            continue
        signs = signs_by_loop(w, uniforms_of(w, path, rule, key=key))
        assert torch.equal(leaves(new)[path], projected_by_loop(w, signs) if rule is enforce else w.abs() * signs)
    assert_same((new_grads, new_state), (grads, state))


@pytest.mark.parametrize("axis", ["presynaptic", "postsynaptic"])
def test_a_negative_zero_becomes_positive_at_every_place(axis):
    w = values(0, (17, 19))  # longer than a vector register, with a rest
    w[w.abs() < 0.5] = -0.0
    new, _ = applied(enforce, w, axis=axis)
    assert (new == 0).any()
    assert not new[new == 0].signbit().any()


def test_postsynaptic_is_the_original_s_sign_per_row():
    w = values(0, (40, 30), torch.float64)
    new, state = applied(impose, w, axis="postsynaptic", sign="drawn")
    assert state.polarity["w"].shape == (40, 1)
    for row in new.tolist():
        assert min(row) >= 0 or max(row) <= 0
    mixed = [min(column) < 0 < max(column) for column in new.T.tolist()]
    assert all(mixed)


def test_columns_have_one_sign_and_rows_both():
    new, _ = applied(enforce, values(0, (40, 30), torch.float64))
    for column in new.T.tolist():
        assert min(column) >= 0 or max(column) <= 0
    assert all([min(row) < 0 < max(row) for row in new.tolist()])


@both_rules
@pytest.mark.parametrize("settings", [{}, DRAWN, {"axis": "postsynaptic"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_idempotent_and_of_the_dtype_given(rule, settings, dtype):
    params, grads = mlp(dtype=dtype)
    state = bf.init(params, KEY, partial(rule, **settings))
    once, same_grads, _ = rule(params, grads, state)
    twice, _, new_state = rule(once, grads, state)
    assert_same(once, twice)
    assert_same((same_grads, new_state), (grads, state))
    assert {w.dtype for w in once.values()} == {dtype}
    compute = torch.float32 if dtype == torch.bfloat16 else dtype
    assert {s.dtype for s in state.polarity.values()} == {compute}
    assert once["fc1.bias"] is params["fc1.bias"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_impose_keeps_the_magnitude(dtype):
    w = values(3, (30, 20), dtype)
    new, state = applied(impose, w, sign="drawn")
    assert torch.equal(new.abs(), w.abs())
    assert torch.equal(new.float(), w.float().abs() * state.polarity["w"])


@both_rules
def test_zeros_are_positive(rule):
    """The original made -0.0 of what it silenced in an inhibitory neuron."""
    w = torch.tensor([[1.0, -2.0], [-3.0, 1.0], [0.0, 0.0]])
    new, _ = applied(rule, w)
    assert not torch.signbit(new[new == 0]).any()


def test_wrong_signs_become_zero_and_right_ones_stay():
    new, _ = applied(enforce, torch.tensor([[1.0, -2.0], [-3.0, 1.0], [4.0, 0.5]]))
    assert new.tolist() == [[1.0, -2.0], [0.0, 0.0], [4.0, 0.0]]


# Layers


def each_channel_has_one_sign(weight, groups, channel_axis=1):
    """By loop: all weights that leave an input channel, to every output of its group, have one sign."""
    seen = {}
    for index in itertools.product(*[range(n) for n in weight.shape]):
        group = index[0] // (weight.shape[0] // groups) if channel_axis else 0
        seen.setdefault((group, index[channel_axis]), set()).add(math.copysign(1, weight[index].item()))
    return len(seen), all([len(signs) == 1 for signs in seen.values()])


LAYERS = {
    "linear": (partial(nn.Linear, 7, 5), 7, 1, 1),
    "conv1d": (partial(nn.Conv1d, 6, 4, 3), 6, 1, 1),
    "conv2d": (partial(nn.Conv2d, 6, 4, 3), 6, 1, 1),
    "conv3d": (partial(nn.Conv3d, 3, 4, 2), 3, 1, 1),
    "grouped": (partial(nn.Conv2d, 6, 9, 3, groups=3), 6, 3, 1),
    "depthwise": (partial(nn.Conv2d, 6, 12, 3, groups=6), 6, 6, 1),
    "one output per group": (partial(nn.Conv1d, 6, 3, 2, groups=3), 6, 3, 1),
    "transposed": (partial(nn.ConvTranspose2d, 6, 4, 3), 6, 1, 0),
    "transposed, grouped": (partial(nn.ConvTranspose1d, 6, 4, 3, groups=2), 6, 1, 0),
    "embedding": (partial(nn.Embedding, 10, 4), 10, 1, 0),
    "embedding bag": (partial(nn.EmbeddingBag, 10, 4), 10, 1, 0),
}


@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["majority", "drawn"])
@pytest.mark.parametrize("name", LAYERS)
def test_all_outputs_of_an_input_channel_share_its_sign(name, settings):
    make, channels, groups, channel_axis = LAYERS[name]
    model = built(make)
    params = {path: w.detach() for path, w in model.named_parameters()}
    axes = presynaptic_axes(model)
    assert axes == {"weight": (channel_axis, groups)}
    rule = partial(impose, axis=axes, **settings)
    state = bf.init(params, KEY, rule)
    new, _, _ = impose(params, params, state)
    assert each_channel_has_one_sign(new["weight"], groups, channel_axis) == (channels, True)
    assert state.polarity["weight"].is_contiguous()
    if name == "grouped":
        assert state.polarity["weight"].shape == (9, 2, 1, 1)


def test_axes_by_path_of_a_whole_model():
    model = built(
        lambda: nn.Sequential(
            nn.Embedding(9, 4),
            nn.Linear(4, 6),
            nn.LayerNorm(6),
            nn.Sequential(nn.Conv2d(6, 4, 3, groups=2)),
            nn.ConvTranspose2d(4, 2, 3),
        )
    )
    assert presynaptic_axes(model) == {"0.weight": (0, 1), "1.weight": (1, 1), "3.0.weight": (1, 2), "4.weight": (0, 1)}


def test_a_tied_weight_has_one_axis():
    model = built(lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)))
    model[1].weight = model[0].weight
    assert presynaptic_axes(model) == {"0.weight": (0, 1)}


def test_paths_not_in_the_mapping_have_axis_1():
    params, _ = mlp()
    state = bf.init(params, KEY, partial(enforce, axis={"fc1.weight": (0, 1)}))
    assert {path: tuple(s.shape) for path, s in state.polarity.items()} == {"fc1.weight": (5, 1), "fc2.weight": (1, 5)}


def test_below_two_dimensions_each_synapse_has_its_own_sign():
    params = {"gain": torch.tensor([1.0, -2.0, 3.0]), "scalar": torch.tensor(-1.5)}
    state = bf.init(params, KEY, enforce, where="*")
    assert {path: s.tolist() for path, s in state.polarity.items()} == {"gain": [1, -1, 1], "scalar": -1}
    crossed = {"gain": torch.tensor([1.0, 2.0, -3.0]), "scalar": torch.tensor(2.0)}
    new, _, _ = enforce(crossed, crossed, state)
    assert {path: w.tolist() for path, w in new.items()} == {"gain": [1, 0, 0], "scalar": 0}


# Where signs come from


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_fraction_excitatory_is_that_of_a_binomial(fraction):
    count = 20_000
    w = torch.zeros(1, count)
    for settings in (DRAWN, {}):  # of zeros there is no majority
        excitatory = (polarity(w, fraction_excitatory=fraction, **settings) > 0).sum().item()
        assert abs(excitatory - count * fraction) <= 5 * math.sqrt(count * fraction * (1 - fraction))


def test_majority_counts_weights_not_heads():
    w = torch.tensor([[5.0, -0.1, 1.0, -1.0], [-1.0, 0.3, 1.0, -1.0], [-1.0, -0.1, 1.0, 1.5]])
    assert polarity(w, fraction_excitatory=0.0)[0].tolist() == [1, 1, 1, -1]


def test_signs_hang_on_no_order_of_summation():
    w = torch.tensor([[1e8, 1.0, -1e8], [3.0, -1.0, 1e-3]]).T.contiguous()
    for order in itertools.permutations(range(3)):
        assert polarity(w[list(order)], fraction_excitatory=0.0)[0].tolist() == [1, 1]


def test_drawn_signs_come_from_the_key_and_not_from_the_weights():
    first, again, other = [
        polarity(values(s, (4, 200)), key=bf.random.key(k), **DRAWN) for s, k in [(0, 1), (9, 1), (0, 2)]
    ]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("order", [(impose, enforce), (enforce, impose)])
@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["majority", "drawn"])
def test_impose_and_enforce_agree_in_one_state(order, settings):
    params, grads = mlp()
    state = bf.init(params, KEY, *[partial(rule, **settings) for rule in order])
    imposed, _, _ = impose(params, grads, state)
    assert_same(enforce(imposed, grads, state)[0], imposed)
    assert_same(state.polarity, bf.init(params, KEY, partial(order[0], **settings)).polarity)
    learn = bf.chain(*[partial(rule, **settings) for rule in order])
    assert_same(learn.init(params, KEY).polarity, state.polarity)


# Composition


@both_rules
@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["majority", "drawn"])
@pytest.mark.parametrize("batched", ["all", "params", "keys"])
def test_vmap_equals_the_loop(rule, settings, batched):
    params, grads, keys = members(3)
    one_params, one_grads, one_key = bf.ensemble.unstack((params, grads, keys))[0]

    def run(p, g, k):
        state = bf.init(p, k, partial(rule, **settings))
        return *rule(p, g, state)[:2], state

    given = {"all": (params, grads, keys), "params": (params, grads, one_key), "keys": (one_params, one_grads, keys)}
    axes = {"all": (0, 0, 0), "params": (0, 0, None), "keys": (None, None, 0)}[batched]
    together = torch.vmap(run, in_dims=axes)(*given[batched])
    assert all([leaf.is_contiguous() and leaf.shape[0] == 3 for leaf in leaves(together[2]).values()])
    for member, result in enumerate(bf.ensemble.unstack(together)):
        alone = [
            x if axis is None else bf.ensemble.unstack(x)[member] for x, axis in zip(given[batched], axes, strict=True)
        ]
        assert_same(result, run(*alone))


def test_vmap_over_the_fraction():
    w = values(0, (2, 3000))
    signs = torch.vmap(lambda f: bf.init({"w": w}, KEY, partial(enforce, fraction_excitatory=f, **DRAWN)).polarity["w"])
    shares = signs(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert shares.dtype == torch.float32
    assert shares.is_contiguous()
    assert torch.allclose((shares > 0).double().mean((1, 2)), torch.tensor([0.1, 0.5, 0.9]).double(), atol=0.05)


@both_rules
def test_compiled_equals_eager_and_compiles_once(rule):
    torch._dynamo.reset()
    weights = {"a.weight": values(0, (6, 2, 3, 3)), "b.weight": values(1, (4, 5)), "b.bias": values(2, (4,))}
    configured = partial(rule, axis={"a.weight": (1, 3)}, sign="drawn")
    params, grads = bf.ensemble.stack([(weights, weights)] * 2)
    state = torch.vmap(lambda p, k: bf.init(p, k, configured))(params, bf.random.key(torch.arange(2)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.vmap(rule), backend=counter, fullgraph=True)
    for _ in range(3):
        result = compiled(params, grads, state)
        assert_same(result, torch.vmap(rule)(params, grads, state))
        params, state = result[0], result[2]
    assert counter.frame_count == 1


@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["majority", "drawn"])
def test_signs_are_kept_over_fifty_steps_of_training(settings):
    model = built(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 1)
        ).double()
    )
    dale = partial(enforce, axis=presynaptic_axes(model), **settings)
    learn = bf.chain(bf.sgd(momentum=0.9), bf.descend(0.05), dale)
    params = {path: w.detach() for path, w in model.named_parameters()}
    start = partial(impose, axis=presynaptic_axes(model), **settings)
    state = bf.init(params, KEY, start, *learn.rules)
    params, _, state = impose(params, params, state)
    x, y = values(1, (16, 2, 5, 5), torch.float64), values(2, (16, 1), torch.float64)

    def loss(params):
        return (functional_call(model, params, (x,)) - y).square().mean()

    first, signs = loss(params), state.polarity
    for _ in range(50):
        params, _, state = learn(params, grad(loss)(params), state)
        for path, s in signs.items():
            assert (params[path] * s >= 0).all()
    assert_same(state.polarity, signs)
    assert loss(params) < 0.8 * first
    assert any([(params[path] == 0).any() for path in signs])  # some synapses tried to cross


def test_what_is_silenced_has_no_gradient_and_what_is_turned_over_the_opposite_one():
    w = torch.tensor([[1.0, -2.0], [-3.0, 1.0], [4.0, 0.5]], dtype=torch.float64)
    state = bf.init({"w": w}, KEY, enforce, impose)
    for rule, factor in ((enforce, 0.0), (impose, -1.0)):
        slope = grad(lambda w, rule=rule: rule({"w": w}, {"w": w}, state)[0]["w"].sum())(w)
        assert slope.tolist() == [[1.0, 1.0], [factor, factor], [1.0, factor]]


# Broken synapses and bad input


@both_rules
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_synapse_spoils_no_other(rule, broken):
    w = values(0, (5, 6), torch.float64)
    spoilt = w.clone()
    spoilt[2, 3] = broken
    rest = torch.ones_like(w, dtype=torch.bool)
    rest[2, 3] = False
    w[2, 3] = 0
    (new, state), (expected, expected_state) = applied(rule, spoilt), applied(rule, w)
    assert_same(state.polarity, expected_state.polarity)
    assert torch.equal(new[rest], expected[rest])
    assert new[2, 3].isnan() == math.isnan(broken)
    assert math.isnan(broken) or new[2, 3] * state.polarity["w"][0, 3] >= 0


@pytest.mark.parametrize(
    ("axis", "error", "message"),
    [
        ("rows", ValueError, r"axis is 'rows'.*'presynaptic', 'postsynaptic'.*presynaptic_axes"),
        (1, ValueError, r"axis is 1; it must be"),
        (None, ValueError, r"axis is None; it must be"),
        ({"fc3.weight": (1, 1)}, KeyError, r"names 'fc3.weight' and no leaf of params; they are: .*fc1.weight"),
        ({"fc1.weight": 1}, TypeError, r"axis of 'fc1.weight' is 1; it must be a pair"),
        ({"fc1.weight": (1, True)}, TypeError, r"axis of 'fc1.weight' is \(1, True\)"),
        ({"fc1.weight": (1, 1.0)}, TypeError, r"axis of 'fc1.weight' is \(1, 1.0\)"),
        ({"fc1.weight": (2, 1)}, ValueError, r"axis of 'fc1.weight' is 2; the leaf has 2 dimensions"),
        ({"fc1.weight": (-1, 1)}, ValueError, r"axis of 'fc1.weight' is -1"),
        ({"fc1.weight": (1, 2)}, ValueError, r"'fc1.weight' of shape \(5, 6\) has 2 groups"),
        ({"fc1.weight": (1, 0)}, ValueError, r"has 0 groups along axis 1"),
        ({"fc1.weight": (0, 5)}, ValueError, r"has 5 groups along axis 0"),
    ],
)
@both_rules
def test_a_bad_axis_is_named(rule, axis, error, message):
    with pytest.raises(error, match=message):
        bf.init(mlp()[0], KEY, partial(rule, axis=axis))


@both_rules
def test_bad_hyperparameters_are_named(rule):
    for value in (-0.1, 1.1, math.nan, True, "0.8"):
        with pytest.raises((ValueError, TypeError), match=r"fraction_excitatory is .*must"):
            bf.init(mlp()[0], KEY, partial(rule, fraction_excitatory=value))
    with pytest.raises(TypeError, match="fraction_excitatory acts at init and takes no schedule"):
        bf.init(mlp()[0], KEY, partial(rule, fraction_excitatory=lambda step: 0.5))
    with pytest.raises(ValueError, match=r"sign is 'random'; it must be 'majority' or 'drawn'"):
        bf.init(mlp()[0], KEY, partial(rule, sign="random"))
    params, grads = mlp()
    state = bf.init(params, KEY, rule)
    for keyword in ({"axis": "postsynaptic"}, {"fraction_excitatory": 0.5}, DRAWN):
        with pytest.raises(TypeError, match="acts at init"):
            rule(params, grads, state, **keyword)


def test_two_axes_for_one_leaf_are_refused():
    with pytest.raises(ValueError, match=r"enforce.*'fc1.weight' of shape \(1, 6\).*\(5, 1\); give both the same axis"):
        bf.init(mlp()[0], KEY, partial(impose, axis="postsynaptic"), enforce)


def test_a_state_without_polarity_is_refused():
    params, grads = mlp()
    with pytest.raises(KeyError, match="state was made without enforce_dales_principle"):
        enforce(params, grads, bf.init(params, KEY))
    with pytest.raises(KeyError, match=r"no polarity of 'fc2.weight'"):
        enforce(params, grads, bf.init(params, KEY, bf.where("fc1.weight", enforce)))


def test_models_without_axes_are_refused():
    with pytest.raises(ValueError, match="no Linear, Conv, ConvTranspose or Embedding layer"):
        presynaptic_axes(nn.LayerNorm(3))
    with pytest.raises(TypeError, match="model is dict"):
        presynaptic_axes(mlp()[0])


def test_the_rules_stand_after_descend():
    with pytest.raises(ValueError, match="behind descend"):
        bf.chain(enforce, bf.sgd(), bf.descend(0.1))


def test_a_chain_that_moves_parameters_imposes_nothing():
    for order in [(impose, bf.descend(0.1)), (bf.descend(0.1), impose)]:
        with pytest.raises(ValueError, match="acts once, before learning; call it alone"):
            bf.chain(*order)
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(ValueError, match="acts once, before learning"):
        bf.attach(torch.optim.SGD(model.parameters(), 0.1), model, weight=[impose], key=KEY)


# Turnover


@pytest.mark.parametrize("selection", ["small", "random"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_synapse_has_the_sign_of_its_neuron(selection, dtype):
    params = {"w": values(0, (300, 40), dtype)}
    turnover = partial(bf.rejuvenate_weights, rate=0.5, selection=selection)
    state = bf.init(params, KEY, partial(impose, **DRAWN), turnover)
    before, _, _ = impose(params, params, state)
    after, _, _ = bf.rejuvenate_weights(before, params, state, rate=0.5, selection=selection)
    signless, _, _ = bf.rejuvenate_weights(before, params, state.replace(polarity={}), rate=0.5, selection=selection)
    redrawn = after["w"] != before["w"]
    assert 0.4 < redrawn.double().mean() < 0.51
    assert (after["w"] * state.polarity["w"] >= 0).all()
    assert torch.equal(after["w"].abs(), signless["w"].abs())
    assert (after["w"][redrawn] != 0).double().mean() > 0.99  # moved to its neuron's side, not silenced


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_silenced_synapse_has_an_heir_of_the_sign_of_its_neuron(dtype):
    """What the projection silenced has no sign to hand on; the log-normal rule would draw one."""
    params = {"w": values(0, (300, 40), dtype)}
    state = bf.init(params, KEY, partial(enforce, **DRAWN), bf.rejuvenate_weights_lognormal)
    before, _, _ = enforce(params, params, state)
    silent = before["w"] == 0
    after, _, _ = bf.rejuvenate_weights_lognormal(before, params, state)
    assert silent.double().mean() > 0.4
    assert (after["w"][silent] != 0).all()
    assert (after["w"] * state.polarity["w"] >= 0).all()
