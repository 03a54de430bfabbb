"""Measures against scalar loops written from their formulas, under vmap and compiled."""

import inspect
import math
from functools import partial

import pytest
import torch
from helpers import assert_same, leaves, mlp, param_trees, values
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import biofunc as bf
from biofunc import measure

LEARN = bf.chain(bf.crystallize, partial(bf.fuzzy_learning_rates, nu=0.4), bf.descend(0.1))


def trained(seed=0, steps=12):
    """Params, and a state in which rates differ and some have crystallised."""
    params, grads = mlp(seed)
    state = LEARN.init(params, bf.random.key(seed))
    for _ in range(steps):
        params, _, state = LEARN(params, grads, state, crystal_thresh=0.3)
    return params, state


def weights_of(params):
    return [w for leaf in leaves(params).values() if leaf.dim() >= 2 for w in leaf.flatten().tolist()]


def sign_of(w, threshold, flips=True):
    if not abs(w) > threshold:
        return 0
    return math.copysign(1, w) if flips else 1


def turnover_loop(before, after, threshold, flips):
    gained = lost = present = 0
    for old, new in zip(before, after, strict=True):
        old, new = sign_of(old, threshold, flips), sign_of(new, threshold, flips)
        lost += old != 0 and new != old
        gained += new != 0 and new != old
        present += (old != 0) + (new != 0)
    return (gained + lost) / present if present else math.nan


def survival_loop(history, threshold, flips):
    first = [sign_of(w, threshold, flips) for w in history[0]]
    alive = [sign != 0 for sign in first]
    born, curve = sum(alive), []
    for weights in history:
        alive = [a and sign_of(w, threshold, flips) == f for a, w, f in zip(alive, weights, first, strict=True)]
        curve.append(sum(alive) / born if born else math.nan)
    return curve


def spectrum_loop(rates, edges):
    counts = [0] * (len(edges) - 1)
    for rate in rates:
        counts[max([i for i in range(len(counts)) if rate >= edges[i]], default=0)] += 1
    return [count / len(rates) for count in counts]


def effective(shares):
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def moment_loop(weights, order):
    logs = [math.log(abs(w)) for w in weights if w != 0]
    mean = sum(logs) / len(logs)
    variance = sum((x - mean) ** 2 for x in logs) / len(logs)
    return sum((x - mean) ** order for x in logs) / len(logs) / variance ** (order / 2)


def close(value, expected, tolerance=1e-5):
    torch.testing.assert_close(
        value.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def test_exports():
    assert sorted(measure.__all__) == measure.__all__
    assert bf.measure is measure
    for name in measure.__all__:
        assert getattr(measure, name).__doc__


@given(param_trees(), st.sampled_from([0.0, 0.3]), st.booleans(), st.integers(0, 99))
def test_turnover_and_survival_are_the_loops(tree, threshold, flips, seed):
    params, other = tree
    if not any(leaf.dim() >= 2 for leaf in leaves(params).values()):
        return
    for w, v in zip(leaves(params).values(), leaves(other).values(), strict=True):
        same = values(seed, w.shape, torch.float64) < 0.5
        v.copy_(torch.where(same, w, v))
    found = measure.turnover(params, other, threshold=threshold, sign_flips=flips)
    close(found, turnover_loop(weights_of(params), weights_of(other), threshold, flips))
    assert found.isnan() or 0 <= found <= 1
    close(measure.turnover(other, params, threshold=threshold, sign_flips=flips), found.item())
    history = bf.ensemble.stack([params, other, params])
    curve = measure.survival(history, threshold=threshold, sign_flips=flips)
    close(curve, survival_loop([weights_of(tree) for tree in (params, other, params)], threshold, flips))
    assert curve.isnan().all() or (curve[0] == 1 and curve[2] == curve[1])


def test_turnover_of_known_changes():
    before = torch.tensor([[1.0, 1.0, -1.0, 0.0, torch.nan]])
    after = torch.tensor([[1.0, 0.1, 1.0, 1.0, 2.0]])
    # one stays, one lost, one flipped, two gained, against 3 present before and 4 after
    assert measure.turnover(before, after, threshold=0.5) == pytest.approx((1 + 2 + 2) / 7)
    assert measure.turnover(before, after, threshold=0.5, sign_flips=False) == pytest.approx((1 + 2) / 7)
    assert measure.turnover(before, before) == 0
    assert measure.turnover(before, -before) == 1
    assert measure.turnover(0 * before, 0 * before).isnan()
    params, _ = mlp()
    assert_same(measure.turnover(params, params, threshold=torch.tensor(0.1)), torch.zeros(()))


def test_rejuvenation_at_a_rate_is_seen_as_turnover():
    """Half of the re-drawn synapses change their sign, each a loss and a gain, out of 2 n: a share of rate / 2."""
    params = {"w": values(0, (100, 100)).abs() + 0.01}
    state = bf.init(params, bf.random.key(0), bf.rejuvenate_weights)
    after, _, _ = bf.rejuvenate_weights(params, params, state, rate=0.2, selection="random")
    assert abs(measure.turnover(params, after) - 0.1) < 0.01
    history = bf.ensemble.stack([params, after])
    assert abs(measure.survival(history)[1] - 0.9) < 0.01


@pytest.mark.parametrize("below", [0.1, 0.7, 1.0])
def test_crystallised_fraction_is_relative_to_the_innate_rate(below):
    _, state = trained()
    expected = []
    for path, rate in state.plasticity.items():
        innate = state.innate(path).flatten().tolist()
        expected += [r < below * i for r, i in zip(rate.flatten().tolist(), innate, strict=True)]
    assert 0 < sum(expected) < len(expected)
    close(measure.crystallised_fraction(state, below=below), sum(expected) / len(expected))
    fresh = LEARN.init(mlp()[0], bf.random.key(0))
    assert measure.crystallised_fraction(fresh, below=1.0) == 0


def test_synapses_that_share_a_rate_are_counted_one_by_one():
    params, _ = mlp()
    state = bf.init(params, bf.random.key(0), bf.sgd())
    shared = state.replace(plasticity={**state.plasticity, "fc1.weight": torch.tensor(0.05)})
    assert state.plasticity["fc1.weight"].dim() == 0
    assert measure.crystallised_fraction(shared) == pytest.approx(30 / 50)
    assert measure.rate_spectrum(shared).max() == pytest.approx(30 / 50)
    assert measure.effective_number_of_rates(state) == 1
    assert measure.crystallised_fraction(shared, where="fc2*") == 0
    assert measure.crystallised_fraction(shared, where="fc1*") == 1


def test_spectrum_and_number_of_rates_are_the_loops():
    _, state = trained()
    rates = [r for rate in state.plasticity.values() for r in rate.flatten().tolist()]
    for edges in (measure_edges(), [0.1, 0.5, 0.9, 1.0, 1.1]):
        expected = spectrum_loop(rates, edges)
        close(measure.rate_spectrum(state, edges=edges), expected)
        close(measure.rate_spectrum(torch.tensor(rates), edges=torch.tensor(edges, dtype=torch.float64)), expected)
        close(measure.effective_number_of_rates(state, edges=edges), effective(expected))


def measure_edges():
    return [1.1 ** (k - 0.5) for k in range(-72, 9)]


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=30))
def test_shares_sum_to_one_and_numbers_lie_between_one_and_the_bins(rates):
    shares = measure.rate_spectrum(torch.tensor(rates))
    assert shares.shape == (80,)
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    number = measure.effective_number_of_rates(torch.tensor(rates))
    assert 1 - 1e-5 <= number <= min(80, len(rates)) + 1e-4
    assert measure.effective_number_of_rates(torch.tensor(rates * 3)) == pytest.approx(number.item(), rel=1e-5)


def test_bins_hold_their_lower_edge_and_all_that_lies_beyond_the_ends():
    rates = torch.tensor([0.0, 1.0, 2.0, 2.5, 3.0, 99.0, torch.inf, torch.nan])
    close(measure.rate_spectrum(rates, edges=[1.0, 2.0, 3.0, 4.0]), [2 / 7, 2 / 7, 3 / 7])
    around = torch.tensor([1 - 1e-3, 1.0, 1 + 1e-3])
    assert measure.effective_number_of_rates(around) == 1
    assert measure.effective_number_of_rates(torch.tensor([0.1, 0.2, 0.4, 0.8])) == pytest.approx(4)


def test_sign_balance_and_log_moments_are_the_loops():
    params, _ = mlp()
    params["fc1.weight"][0, 0] = torch.nan
    finite = [w for w in weights_of(params) if not math.isnan(w)]
    present = [w for w in finite if w != 0]
    assert len(present) < len(finite)
    close(measure.sign_balance(params), sum(w > 0 for w in present) / len(present))
    close(measure.log_weight_skew(params), moment_loop(present, 3))
    close(measure.log_weight_kurtosis(params), moment_loop(present, 4) - 3)


@given(st.integers(0, 999), st.floats(1e-3, 1e3))
def test_log_moments_do_not_see_scale_or_sign(seed, factor):
    w = values(seed, (30, 3), torch.float64)
    for moment in (measure.log_weight_skew, measure.log_weight_kurtosis):
        assert moment(-factor * w) == pytest.approx(moment(w).item(), rel=1e-6)
    # for every distribution, kurtosis >= skew^2 + 1
    assert measure.log_weight_kurtosis(w) + 3 >= measure.log_weight_skew(w) ** 2 + 1


def test_log_normal_sizes_have_no_skew_and_no_excess():
    z = values(0, (400, 400), torch.float64)
    z = z[z != 0][None]
    sizes = z.exp() * torch.where(values(1, z.shape) > 0, 1, -1)
    assert abs(measure.log_weight_skew(sizes)) < 0.03
    assert abs(measure.log_weight_kurtosis(sizes)) < 0.06
    assert measure.log_weight_skew(z) == pytest.approx(-1.54, abs=0.05)
    assert measure.log_weight_kurtosis(z) == pytest.approx(4.0, abs=0.3)


def test_equal_sizes_have_no_moments_whatever_rounding_makes_of_their_mean():
    for count in range(1, 60):
        for size in (0.1, 0.3, 7.7):
            assert measure.log_weight_skew(torch.full((count, 1), size)).isnan()
            assert measure.log_weight_kurtosis(torch.full((count, 1), -size)).isnan()


def consistency_loop(w, polarity=None):
    shares = []
    for j in range(w.shape[1]):
        column = [x for x in w[:, j].flatten().tolist() if x != 0 and math.isfinite(x)]
        positive = sum(x > 0 for x in column) / len(column) if column else math.nan
        if polarity is not None:
            positive = positive if polarity[j] > 0 else 1 - positive
        shares.append(max(positive, 1 - positive) if polarity is None else positive)
    return shares


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2)])
def test_dale_consistency_is_the_loop(shape):
    params = {"w": values(3, shape), "b": values(4, (6,))}
    params["w"][:, 1] = 0
    params["w"][0, 0] = torch.inf
    found = measure.dale_consistency(params)
    assert list(found) == ["w"]
    close(found["w"], consistency_loop(params["w"]))
    signs = torch.tensor([1.0, -1.0] * 5)[: shape[1]]
    polarity = {"w": signs.reshape(1, -1, *[1] * (len(shape) - 2))}
    close(measure.dale_consistency(params, polarity=polarity)["w"], consistency_loop(params["w"], signs.tolist()))


def test_dale_consistency_of_a_network_that_obeys_and_of_grouped_and_transposed_layers():
    params, _ = mlp()
    start = partial(bf.impose_dales_principle, sign="drawn")
    state = bf.init(params, bf.random.key(0), start)
    obeys, _, state = bf.impose_dales_principle(params, params, state)
    for found in (measure.dale_consistency(obeys), measure.dale_consistency(obeys, polarity=state.polarity)):
        assert (torch.cat(list(found.values())) == 1).all()
        assert found["fc1.weight"].shape == (6,)
    assert torch.cat(list(measure.dale_consistency(params).values())).mean() < 0.9
    w = torch.ones(4, 2, 3)
    w[2:] = -1
    assert measure.dale_consistency({"w": w}, axis={"w": (1, 2)})["w"].tolist() == [1, 1, 1, 1]
    assert measure.dale_consistency({"w": w}, axis={"w": (0, 1)})["w"].tolist() == [1, 1, 1, 1]
    assert measure.dale_consistency({"w": w})["w"].tolist() == [0.5, 0.5]
    assert measure.dale_consistency({"w": w}, axis="postsynaptic")["w"].tolist() == [1, 1, 1, 1]


def test_dead_units_of_a_recorded_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    params["0.bias"][:3] = -100
    _, activity = bf.record_activity(model)(params, {}, values(0, (50, 6)))
    assert measure.dead_unit_fraction(activity, where="0.*") == pytest.approx(3 / 8)
    assert measure.dead_unit_fraction(activity) == pytest.approx(3 / 11)


def test_dead_units_of_known_activities():
    activity = {"a": torch.tensor([0.0, 1.0, 3.0, -0.5, torch.nan]), "b": torch.tensor([0.1, 0.1])}
    assert measure.dead_unit_fraction(activity) == pytest.approx(1 / 6)
    assert measure.dead_unit_fraction(activity, threshold=0.5) == pytest.approx(4 / 6)
    # the mean of |a| is 4.5 / 4 in "a" and 0.1 in "b"
    assert measure.dead_unit_fraction(activity, threshold=0.5, relative=True) == pytest.approx(2 / 6)
    assert measure.dead_unit_fraction(activity, threshold=torch.tensor(1.0), relative=True) == pytest.approx(5 / 6)


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_effective_rank_lies_between_one_and_the_rank(seed, samples, units, factor):
    x = values(seed, (samples, units), torch.float64) + 0.01
    rank = measure.effective_rank(x)
    assert 1 - 1e-9 <= rank <= min(samples, units) + 1e-9
    assert measure.effective_rank(factor * x.T) == pytest.approx(rank.item(), rel=1e-6)
    s = torch.linalg.svdvals(x)
    close(rank, effective((s / s.sum()).tolist()), 1e-9)


def test_effective_rank_of_known_matrices():
    assert measure.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert measure.effective_rank(torch.outer(torch.arange(1.0, 5), torch.ones(3))) == pytest.approx(1, abs=1e-4)
    assert measure.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(effective([0.75, 0.25]))
    assert measure.effective_rank(torch.eye(4, dtype=torch.bfloat16)) == pytest.approx(4)
    assert measure.effective_rank(torch.zeros(3, 4)) == 0
    assert measure.effective_rank(torch.zeros(0, 4)) == 0
    one_broken = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)])
    assert_same(torch.vmap(measure.effective_rank)(one_broken), torch.tensor([3.0, torch.nan]), ulps=4)


def test_response_probe_is_the_mean_drop_and_changes_nothing():
    """Gradient descent on w^2 / 2 at rate 1/2 halves w."""
    params, state = torch.tensor(4.0), torch.tensor(0)

    def step(w, count, scale):
        return w - 0.5 * scale * w, count + 1

    def loss(w):
        return w.square() / 2

    probed = measure.response_probe(step, params, state, [(1.0,)] * 3, loss)
    assert probed == pytest.approx(((8 - 2) + (8 - 0.5) + (8 - 0.125)) / 3)
    assert params == 4
    assert state == 0
    assert measure.response_probe(step, params, state, [[0.0]] * 3, loss) == 0
    assert measure.response_probe(step, params, state, [(-1.0,)], loss) < 0
    members = torch.tensor([4.0, 0.0, torch.nan])
    found = measure.response_probe(step, members, state, [(1.0,)], loss)
    assert_same(found, torch.tensor([6.0, 0.0, torch.nan]))


def test_response_probe_of_networks_that_crystallised():
    x, y = values(0, (40, 6)), values(1, (40, 4))

    def loss(p):
        return (torch.relu(x @ p["fc1.weight"].T + p["fc1.bias"]) @ p["fc2.weight"].T - y).square().mean()

    def step(params, state, scale):
        grads = {path: scale * g for path, g in torch.func.grad(loss)(params).items()}
        params, _, state = LEARN(params, grads, state)
        return params, state

    params, _ = mlp()
    state = LEARN.init(params, bf.random.key(0))
    frozen = state.replace(plasticity={path: 0.01 * rate for path, rate in state.plasticity.items()})
    batches = [(torch.tensor(1.0),)] * 5
    plastic, stiff = [measure.response_probe(step, params, s, batches, loss) for s in (state, frozen)]
    assert 0 < stiff < plastic / 2
    stacked = bf.ensemble.stack([state, frozen])
    both = torch.vmap(lambda s: measure.response_probe(step, params, s, batches, loss))(stacked)
    close(both, [plastic.item(), stiff.item()])


TREE_MEASURES = [
    measure.sign_balance,
    measure.dale_consistency,
    measure.log_weight_skew,
    measure.log_weight_kurtosis,
    measure.dead_unit_fraction,
]
STATE_MEASURES = [measure.crystallised_fraction, measure.rate_spectrum, measure.effective_number_of_rates]


@pytest.fixture(scope="module")
def ensemble():
    """Arguments of the measures, stacked over three members."""
    params, states = bf.ensemble.stack([trained(seed) for seed in range(3)])
    other = bf.ensemble.stack([mlp(seed)[0] for seed in range(3)])
    history = {path: torch.stack([leaf, other[path], leaf], 1) for path, leaf in params.items()}
    return {
        "turnover": (params, other),
        "survival": (history,),
        "effective_rank": (values(0, (3, 9, 4)),),
        **{function.__name__: (params,) for function in TREE_MEASURES},
        **{function.__name__: (states,) for function in STATE_MEASURES},
    }


@pytest.mark.parametrize("name", [name for name in measure.__all__ if name != "response_probe"])
def test_vmap_is_the_loop_and_compiled_is_eager(name, ensemble, fresh_compiler):
    function, inputs = getattr(measure, name), ensemble[name]
    if name in ("turnover", "survival"):
        function = partial(function, threshold=0.05)
    together = torch.vmap(function)(*inputs)
    alone = bf.ensemble.stack([function(*member) for member in bf.ensemble.unstack(inputs)])
    assert_same(together, alone, ulps=8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch.vmap(function), fullgraph=True, backend=counter)
    for _ in range(2):
        assert_same(compiled(*inputs), together, ulps=8)
    assert counter.frame_count == 1


def test_measures_keep_their_hands_off():
    params, state = trained()
    before = bf.ensemble.stack([(params, state)])
    learnt = {path: w.clone().requires_grad_() for path, w in params.items()}
    for function in TREE_MEASURES:
        for leaf in leaves(function(learnt)).values():
            assert not leaf.requires_grad
    for function in STATE_MEASURES:
        function(state)
    assert not measure.turnover(learnt, params).requires_grad
    assert not measure.effective_rank(learnt["fc1.weight"]).requires_grad
    assert_same(bf.ensemble.unstack(before)[0], (params, state))


def test_where_chooses_leaves_and_a_path_gives_one():
    params, _ = mlp()
    other = {path: -w for path, w in params.items()}
    changed = {**params, "fc2.weight": other["fc2.weight"], "fc1.bias": other["fc1.bias"]}
    state = bf.init(params, bf.random.key(0), bf.crystallize, where="fc1.*")
    per_leaf = {path: measure.turnover(params, changed, where=path).item() for path in params}
    assert per_leaf == {"fc1.weight": 0, "fc1.bias": 1, "fc2.weight": 1, "fc2.bias": 0}
    assert 0 < measure.turnover(params, changed) < 1
    assert measure.turnover(params, changed, where=lambda path, leaf: path == "fc2.weight") == 1
    mask = {path: path == "fc2.weight" for path in params}
    assert measure.turnover(params, changed, where=mask) == 1
    close(measure.turnover(params, changed, where=state), measure.turnover(params, changed, where="fc1.*").item())
    assert measure.turnover(params["fc1.bias"], changed["fc1.bias"]) == 1
    history = bf.ensemble.stack([params, changed])
    assert measure.survival(history, where="fc2.weight").tolist() == [1, 0]
    assert_same(measure.survival(history), measure.survival(history, where="*.weight"))  # a bias in time is no weight
    assert measure.survival(history)[1] != measure.survival(history, where="*")[1]


def test_nothing_to_measure_is_nan():
    zeros = {"w": torch.zeros(3, 3), "b": torch.ones(3)}
    for function in (measure.sign_balance, measure.log_weight_skew, measure.log_weight_kurtosis):
        assert function(zeros).isnan()
        assert function({}).isnan()
        assert function({"w": torch.zeros(0, 3)}).isnan()
    assert measure.turnover({}, {}).isnan()
    assert measure.survival(torch.zeros(2, 3, 3)).isnan().all()
    assert measure.dead_unit_fraction({}).isnan()
    assert measure.dale_consistency(zeros)["w"].isnan().all()
    assert measure.dale_consistency({}) == {}
    state = bf.init({"b": torch.ones(3)}, bf.random.key(0), bf.sgd())
    assert measure.crystallised_fraction(state).isnan()
    assert measure.rate_spectrum(torch.zeros(0)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    params = {path: w.to(dtype) for path, w in mlp()[0].items()}
    exact = {path: w.double() for path, w in params.items()}
    for function in TREE_MEASURES:
        assert_same(
            {path: leaf.double() for path, leaf in leaves(function(params)).items()},
            {path: leaf.double() for path, leaf in leaves(function(exact)).items()},
            ulps=1e11,
        )


def test_help_shows_no_numbers_of_the_default_bins():
    for function in (measure.rate_spectrum, measure.effective_number_of_rates):
        assert "edges: collections.abc.Sequence[float] | torch.Tensor | None = None" in str(inspect.signature(function))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda p, s: measure.turnover(p, {**p, "fc1.weight": torch.ones(2, 2)}),
            ValueError,
            "after leaf 'fc1.weight'",
        ),
        (lambda p, s: measure.turnover(p, {"fc1.weight": p["fc1.weight"]}), KeyError, "after has no leaf 'fc1.bias'"),
        (lambda p, s: measure.turnover(p, p, threshold=-1.0), ValueError, "threshold is -1.0; it must be 0 or larger"),
        (lambda p, s: measure.turnover(p, p, threshold=math.nan), ValueError, "threshold is nan"),
        (lambda p, s: measure.turnover(p, p, where="conv*"), ValueError, "selects no synapse"),
        (lambda p, s: measure.turnover({"w": 1}, {"w": 1}), TypeError, "before leaf 'w' is of int"),
        (lambda p, s: measure.turnover(p["fc1.weight"], p["fc1.weight"], where=s), KeyError, "'fc1.weight'"),
        (lambda p, s: measure.survival({"w": torch.tensor(1.0)}), ValueError, "history leaf 'w' has shape"),
        (lambda p, s: measure.survival(p), ValueError, "history leaf 'fc2.bias' has shape .4,.; all leaves share"),
        (lambda p, s: measure.survival({"w": torch.ones(0, 2, 2)}), ValueError, "of length 1 or more"),
        (lambda p, s: measure.survival({"w": torch.ones(2, 2).long()}), TypeError, "history leaf 'w' is of dtype"),
        (lambda p, s: measure.crystallised_fraction(s, below=-0.1), ValueError, "below is -0.1"),
        (lambda p, s: measure.crystallised_fraction(p), TypeError, "state is dict; give the BioState"),
        (lambda p, s: measure.crystallised_fraction(bf.ensemble.stack([s, s])), ValueError, "under torch.vmap"),
        (lambda p, s: measure.rate_spectrum(s, edges=[1.0]), ValueError, "edges are .1.0.; give two or more"),
        (lambda p, s: measure.rate_spectrum(s, edges=[1.0, 2.0, 2.0]), ValueError, "give two or more that rise"),
        (lambda p, s: measure.rate_spectrum(s, where="fc9*"), ValueError, "selects no synapse"),
        (lambda p, s: measure.sign_balance({"w": torch.ones(2, 2).int()}), TypeError, "params leaf 'w' is of dtype"),
        (lambda p, s: measure.dale_consistency(p, axis="rows"), ValueError, "axis is 'rows'"),
        (lambda p, s: measure.dale_consistency(p, axis={"conv": (1, 1)}), KeyError, "axis names 'conv'"),
        (
            lambda p, s: measure.dale_consistency(p, axis={"fc1.weight": (2, 1)}),
            ValueError,
            "axis of 'fc1.weight' is 2",
        ),
        (lambda p, s: measure.dale_consistency(p, polarity={}), KeyError, "polarity has no leaf 'fc1.weight'"),
        (lambda p, s: measure.dead_unit_fraction(p, threshold=-1), ValueError, "threshold is -1"),
        (lambda p, s: measure.effective_rank(torch.ones(2, 3, 4)), ValueError, "features has shape .2, 3, 4."),
        (lambda p, s: measure.effective_rank(torch.ones(2, 3).long()), TypeError, "features is of dtype torch.int64"),
        (lambda p, s: measure.response_probe(None, p, s, [], lambda p: torch.ones(())), ValueError, "batches is empty"),
        (lambda p, s: measure.response_probe(None, p, s, [1], lambda p: torch.ones(())), TypeError, "holds a int"),
        (lambda p, s: measure.response_probe(None, p, s, [], lambda p: 1.0), TypeError, "loss gives float"),
    ],
)
def test_errors_name_what_is_wrong(call, error, message):
    params, state = trained(steps=1)
    with pytest.raises(error, match=message):
        call(params, state)
