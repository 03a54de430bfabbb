"""Rates at birth: every distribution has mean 1, the spread it states, and is drawn per synapse."""

import math
from functools import partial

import pytest
import torch
from helpers import assert_same, mlp
from scipy import stats

import biofunc as bf
from biofunc import distributions

N = 10**6
WEIGHT = bf.random.normal(bf.random.key(1), (1000, 1000), dtype=torch.float64)

# standard deviation by nu
SPREAD = {
    "baseline": lambda nu: 0.0,
    "uniform": lambda nu: nu / math.sqrt(3),
    "normal": lambda nu: nu,
    "lognormal": lambda nu: math.sqrt(math.exp(nu**2) - 1),
    "gamma": lambda nu: nu,
    "beta": lambda nu: nu / math.sqrt(2 / nu + 1),
}


@pytest.mark.parametrize("nu", [0.05, 0.16, 0.5, 0.9])
@pytest.mark.parametrize("name", SPREAD)
def test_mean_is_one_and_spread_as_stated(name, nu):
    """10^6 draws on a fixed key; five standard errors."""
    rates = distributions.NAMED[name](bf.random.key(2), WEIGHT, nu, "w")
    sd = SPREAD[name](nu)
    kurtosis = 30  # above that of a log-normal with nu = 0.9 would be loose; it bounds the error of the spread
    assert rates.shape == WEIGHT.shape
    assert abs(rates.mean() - 1) <= 5 * sd / math.sqrt(N)
    assert abs(rates.std() - sd) <= 5 * sd * math.sqrt(kurtosis / (4 * N))


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("uniform", lambda nu: stats.uniform(1 - nu, 2 * nu)),
        ("normal", lambda nu: stats.norm(1, nu)),
        ("lognormal", lambda nu: stats.lognorm(nu, scale=math.exp(-(nu**2) / 2))),
        ("gamma", lambda nu: stats.gamma(1 / nu**2, scale=nu**2)),
        ("beta", lambda nu: stats.beta(1 / nu, 1 / nu, 1 - nu, 2 * nu)),
    ],
)
def test_draws_follow_the_stated_law(name, law):
    rates = distributions.NAMED[name](bf.random.key(3), WEIGHT, 0.3, "w")
    assert stats.kstest(rates.flatten().numpy(), law(0.3).cdf).pvalue > 1e-4


def test_weight_adaptive_rates_spread_more_where_weights_are_weak():
    nu, size = 0.4, WEIGHT.abs()
    rates = distributions.weight_adaptive(bf.random.key(4), WEIGHT, nu, "w")
    assert abs(rates.mean() - 1) < 5 * rates.std() / math.sqrt(N)
    reach = nu * (2 - size / size.mean()).clamp(0.5, 1.5)
    assert ((rates - 1).abs() <= reach).all()
    assert ((rates - 1).abs() / reach).max() > 0.999
    broken = WEIGHT.clone()
    broken[0, 0] = torch.nan
    assert distributions.weight_adaptive(bf.random.key(4), broken, nu, "w").isfinite().all()
    assert (distributions.weight_adaptive(bf.random.key(4), torch.zeros(3, 3), nu, "w") - 1).abs().max() <= nu


def test_layer_adaptive_rates_spread_less_in_late_layers():
    layered = distributions.layer_adaptive(["a", "b", "c", "d"])
    for index, path in enumerate("abcd"):
        reach = 0.4 * (1 - index / 8)
        rates = layered(bf.random.key(5), WEIGHT, 0.4, path)
        assert reach * 0.9999 < (rates - 1).abs().max() <= reach
    with pytest.raises(KeyError, match="layer_adaptive was made without 'e'"):
        layered(bf.random.key(5), WEIGHT, 0.4, "e")


@pytest.mark.parametrize("name", [*distributions.NAMED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_by_name_through_the_rule_with_bounds(name, dtype):
    params, _ = mlp(dtype=dtype)
    fuzzy = partial(bf.fuzzy_learning_rates, distribution=name, nu=0.8, rate_min=0.6, rate_max=1.3)
    state = bf.init(params, bf.random.key(0), fuzzy)
    for path, rate in state.plasticity.items():
        assert rate.shape == params[path].shape
        assert rate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert 0.6 - 1e-6 <= rate.min() <= rate.max() <= 1.3 + 1e-6
        assert (rate.unique().numel() == 1) == (name == "baseline")


@pytest.mark.parametrize("name", ["normal", "gamma", "beta", "weight_adaptive"])
def test_init_sweeps_over_nu_and_seeds_by_vmap(name):
    params, _ = mlp()

    def init(nu, key):
        return bf.init(params, key, partial(bf.fuzzy_learning_rates, distribution=name, nu=nu)).plasticity

    nus, keys = torch.tensor([0.0, 0.1, 0.5]), bf.random.key(torch.arange(3))
    looped = bf.ensemble.stack([init(nu, key) for nu, key in zip(nus, keys, strict=True)])
    assert_same(torch.vmap(init)(nus, keys), looped, ulps=4)  # means over a leaf, powers


# Rates that drift


def drift(**keywords):
    return bf.chain(partial(bf.temporal_learning_rates, **keywords), partial(bf.fuzzy_learning_rates, nu=0))


def test_rates_relax_geometrically_and_are_renewed_at_every_period():
    params, grads = mlp(dtype=torch.float64)
    learn = drift(nu=0.3, decay=0.5, renewal=0.2, renewal_period=3)
    state = learn.init(params, bf.random.key(0))
    for call in range(1, 7):
        before = state.plasticity["fc1.weight"]
        _, _, state = learn(params, grads, state)
        change = state.plasticity["fc1.weight"] - (1 + (before - 1) * 0.5)
        if call % 3:
            assert change.abs().max() < 1e-15
        else:
            assert 0.03 < change.abs().max() <= 0.2 * 0.3
    assert state.slots["temporal_learning_rates"]["calls"]["fc1.weight"] == 6


def test_drift_keeps_what_crystallisation_has_taken():
    params, grads = mlp()
    learn = bf.chain(bf.crystallize, *drift(nu=0.3, decay=0.9).rules)
    state = learn.init(params, bf.random.key(0))
    state = state.replace(plasticity={path: 1e-3 * rate for path, rate in state.plasticity.items()})
    for _ in range(20):
        _, _, state = learn(params, {path: 1e-2 + 0 * g for path, g in grads.items()}, state)
    assert all(rate.max() < 2e-3 for rate in state.plasticity.values())


def test_drifting_rates_keep_their_mean_over_many_calls():
    w = {"w": WEIGHT}
    learn = drift(nu=0.1, decay=0.99, renewal=1.0, renewal_period=2)  # within the bounds
    state = learn.init(w, bf.random.key(0))
    for _ in range(6):
        _, _, state = learn(w, w, state)
    rates = state.plasticity["w"]
    assert abs(rates.mean() - 1) < 5 * rates.std() / math.sqrt(N)


# The penalty


def test_l1_penalty_is_the_total_weight_of_the_synapses():
    params, _ = mlp(dtype=torch.float64)
    expected = sum(abs(x) for path in ("fc1.weight", "fc2.weight") for x in params[path].flatten().tolist())
    assert abs(bf.l1_penalty(params) - expected) < 1e-12
    assert bf.l1_penalty(params, where="fc1.weight") == params["fc1.weight"].abs().sum()
    gradient = torch.func.grad(bf.l1_penalty)(params)
    assert torch.equal(gradient["fc1.weight"], params["fc1.weight"].sign())
    assert (gradient["fc1.bias"] == 0).all()
    assert bf.l1_penalty({}) == 0
    stacked = bf.ensemble.stack([params, params])
    assert torch.vmap(bf.l1_penalty)(stacked).shape == (2,)
    with pytest.raises(ValueError, match="selects no synapse"):
        bf.l1_penalty(params, where="fc9*")


# Log-normal turnover


def test_new_synapses_have_the_sign_of_the_old_and_sizes_of_the_leaf():
    w = {"w": torch.exp(0.8 * WEIGHT) * bf.random.rademacher(bf.random.key(9), (1000, 1000), dtype=torch.float64)}
    state = bf.init(w, bf.random.key(1))
    new, _, _ = bf.rejuvenate_weights_lognormal(w, w, state, dre=2.0)
    died = new["w"] != w["w"]
    size, fresh = w["w"].abs(), new["w"][died].abs()
    expected = torch.exp(-2.0 * size / w["w"].std()).mean()
    assert abs(died.double().mean() - expected) < 5 * math.sqrt(expected / N)
    assert (new["w"].sign() == w["w"].sign()).all()
    assert abs(fresh.mean() / size.mean() - 1) < 0.02
    assert abs(fresh.std() / size.std() - 1) < 0.05
    assert stats.kstest(fresh.log().numpy(), "norm", (fresh.log().mean(), fresh.log().std())).pvalue > 1e-4
    same, _, _ = bf.rejuvenate_weights_lognormal(w, w, state, dre=2.0, spread=0.0)
    torch.testing.assert_close(same["w"][same["w"] != w["w"]].abs(), size.mean().expand(int(died.sum())))


# Rates that follow activity


def test_quiet_neurons_have_rates_that_differ_more():
    w = {"w": torch.ones(4, 10**5)}
    activity = {"w": torch.tensor([0.0, 1.0, 1.0, 8.0])}
    learn = bf.chain(partial(bf.activity_dependent_rates, nu=0.3), partial(bf.fuzzy_learning_rates, nu=0))
    _, _, state = learn(w, w, learn.init(w, bf.random.key(0)), activity=activity, gain=1.0)
    reach = (state.plasticity["w"] - 1).abs().amax(1)
    torch.testing.assert_close(reach, 0.3 * torch.tensor([1.2, 1.2, 1.2, 0.8]), rtol=1e-3, atol=0)
    assert abs(state.plasticity["w"].mean() - 1) < 5 * 0.2 / math.sqrt(4e5)


def test_missing_or_misshapen_activity_is_named():
    params, grads = mlp()
    state = bf.init(params, bf.random.key(0), bf.activity_dependent_rates)
    with pytest.raises(TypeError, match="activity is missing; hand it over"):
        bf.activity_dependent_rates(params, grads, state)
    with pytest.raises(KeyError, match=r"activity has no leaf 'fc2.weight'"):
        bf.activity_dependent_rates(params, grads, state, activity={"fc1.weight": torch.ones(5)})
    wrong = {"fc1.weight": torch.ones(6), "fc2.weight": torch.ones(4)}
    with pytest.raises(ValueError, match=r"'fc1.weight' has shape \(6,\), its neurons \(axis 0 of the weight\) \(5,\)"):
        bf.activity_dependent_rates(params, grads, state, activity=wrong)
