"""Parity with pytorch_bio_transformations 0.0.5: the same formulas where biofunc keeps them, side by side.

What is deterministic must be equal; what is random must follow the same law (10^6 draws, p > 1e-3, fixed seeds). Each
deliberate difference is a row of the migration table in the README; what the original does there is pinned here.
"""

import math
from functools import partial

import pytest
import torch
from bio_transformations.bio_config import DEFAULT_BIO_CONFIG
from bio_transformations.bio_module import BioModule
from scipy import stats

import biofunc as bf
from biofunc import distributions

SHAPE = (1000, 1000)
WEIGHT = 0.1 * bf.random.normal(bf.random.key(1), SHAPE)
GRADIENT = 0.1 * bf.random.normal(bf.random.key(2), SHAPE)
KEY = bf.random.key(3)


@pytest.fixture(autouse=True)
def seeded_generator():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def original(weight=WEIGHT, gradient=None, **config):
    """A linear layer with the original's module behind it."""
    with torch.device("meta"):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = torch.nn.Parameter(weight.clone())
    layer.bias = None
    module = BioModule(lambda: layer, DEFAULT_BIO_CONFIG._replace(**config))
    if gradient is not None:
        layer.weight.grad = gradient.clone()
    return layer, module


def rates_of(module):
    return module.fuzzy_learning_rate_parameters.detach()


def ours(rule, weight=WEIGHT, gradient=GRADIENT, **state_fields):
    state = bf.init({"w": weight}, KEY, rule).replace(**state_fields)
    params, grads, state = rule.func({"w": weight}, {"w": gradient}, state, **rule.keywords)
    return params["w"], grads["w"], state


# Deterministic parts


@pytest.mark.parametrize(("threshold", "factor"), [(4.5e-5, 0.6), (0.3, 0.9)])
def test_crystallize_damps_the_same_synapses_by_the_same_factor(threshold, factor):
    gradient = GRADIENT.clone()
    gradient[:10] = 0.0  # dead neurons
    _, module = original(gradient=gradient, crystal_thresh=threshold, dampening_factor=factor)
    born = rates_of(module).clone()
    state = bf.init({"w": WEIGHT}, KEY, bf.crystallize).replace(plasticity={"w": born})
    for _ in range(3):
        module.crystallize()
        _, _, state = bf.crystallize(
            {"w": WEIGHT},
            {"w": gradient},
            state,
            crystal_thresh=threshold,
            dampening_factor=factor,
            freeze_silent=True,
        )
    # |g| / |w| < t against |g| < t |w|: rounding may tip a synapse that sits on the threshold
    differs = ~torch.isclose(state.plasticity["w"], rates_of(module), rtol=1e-6, atol=0)
    assert differs.sum() <= 1
    frozen = rates_of(module)[:10] / born[:10]
    torch.testing.assert_close(frozen, torch.full_like(frozen, factor**3))  # the original freezes dead neurons
    _, _, unfrozen = bf.crystallize({"w": WEIGHT}, {"w": gradient}, bf.init({"w": WEIGHT}, KEY, bf.crystallize))
    assert (unfrozen.plasticity["w"][:10] == 1).all()


def test_fuzzy_rates_are_applied_by_the_same_product():
    layer, module = original(gradient=GRADIENT)
    module.fuzzy_learning_rates()
    _, scaled, _ = ours(partial(bf.fuzzy_learning_rates), plasticity={"w": rates_of(module)})
    assert torch.equal(scaled, layer.weight.grad)


def test_temporal_rates_decay_alike():
    config = {"fuzzy_lr_distribution": "temporal", "fuzzy_lr_dynamic": True, "fuzzy_lr_decay": 0.9}
    _, module = original(**config, fuzzy_lr_update_freq=1)
    born = rates_of(module).clone()
    rule = partial(bf.temporal_learning_rates, decay=0.9, renewal=0.0)
    state = bf.init({"w": WEIGHT}, KEY, rule).replace(plasticity={"w": born})
    state = state.with_slot("temporal_learning_rates", innate={"w": born})
    for _ in range(5):
        module.update_fuzzy_learning_rates()
        _, _, state = bf.temporal_learning_rates({"w": WEIGHT}, {"w": WEIGHT}, state, decay=0.9, renewal=0.0)
    torch.testing.assert_close(state.plasticity["w"], rates_of(module), rtol=2e-6, atol=0)


def test_split_layers_sum_and_repeat_the_same_contacts():
    from bio_transformations import BioConverter

    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    split = bf.split_synapses(model, 2)
    x = torch.randn(5, 8)
    expected = split(x)
    converted = BioConverter(weight_splitting_Gamma=2).convert(model)
    torch.testing.assert_close(converted(x), expected)


# Random parts


@pytest.mark.parametrize("w", [0.0, 0.3, -2.0])
def test_volume_factors_follow_the_same_law(w):
    weight, ones = torch.full(SHAPE, w), torch.ones(SHAPE)
    layer, module = original(weight, ones)
    module.volume_dependent_lr()
    _, factors, _ = ours(partial(bf.volume_dependent_lr), weight, ones)
    assert stats.ks_2samp(factors.flatten().numpy(), layer.weight.grad.flatten().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("nu", [0.16, 0.5])
@pytest.mark.parametrize("name", ["baseline", "uniform", "normal", "lognormal", "beta", "temporal"])
def test_rates_at_birth_follow_the_same_law(name, nu):
    _, module = original(fuzzy_lr_distribution=name, fuzzy_learning_rate_factor_nu=nu)
    drawn = distributions.NAMED.get(name, distributions.uniform)(KEY, WEIGHT, nu, "w").clamp(0.5, 2.0)
    assert stats.ks_2samp(drawn.flatten().numpy(), rates_of(module).flatten().numpy()).pvalue > 1e-3


def test_weight_adaptive_rates_follow_the_same_law_given_the_weights():
    _, module = original(fuzzy_lr_distribution="weight_adaptive")
    module.update_fuzzy_learning_rates()
    drawn = distributions.weight_adaptive(KEY, WEIGHT, 0.16, "w")
    weak = WEIGHT.abs() < WEIGHT.abs().median()
    for part in (weak, ~weak):
        assert stats.ks_2samp(drawn[part].numpy(), rates_of(module)[part].numpy()).pvalue > 1e-3


def test_synapses_die_with_the_same_probability_in_the_lognormal_variant():
    layer, module = original()
    module.rejuvenate_weights()
    theirs = layer.weight.detach() != WEIGHT
    mine, _, _ = ours(partial(bf.rejuvenate_weights_lognormal))
    died = mine != WEIGHT
    order = WEIGHT.abs().flatten().argsort()
    for bin_ in order.split(SHAPE[0] * 100):  # deciles of size
        shares = [mask.flatten()[bin_].double().mean().item() for mask in (died, theirs)]
        error = math.sqrt(2 * max(shares) * (1 - min(shares)) / len(bin_)) + 1e-9
        assert abs(shares[0] - shares[1]) < 5 * error


# What the rows of the migration table rest on


def test_the_original_gamma_has_mean_two_before_its_clamp():
    _, module = original(fuzzy_lr_distribution="gamma")
    assert abs(rates_of(module).mean() - 1.843) < 0.01
    assert (rates_of(module) == 2).double().mean() > 0.4
    assert abs(distributions.gamma(KEY, WEIGHT, 0.16, "w").mean() - 1) < 1e-3


def test_the_original_lognormal_turnover_leaves_vanishing_positive_weights():
    layer, module = original()
    module.rejuvenate_weights()
    new = layer.weight.detach()[layer.weight.detach() != WEIGHT]
    assert (new > 0).all()
    assert new.median() < 1e-5
    mine, _, _ = ours(partial(bf.rejuvenate_weights_lognormal))
    fresh = mine[mine != WEIGHT]
    assert 0.4 < (fresh > 0).double().mean() < 0.6
    assert abs(fresh.abs().mean() / WEIGHT.abs().mean() - 1) < 0.05


def test_the_original_l1_term_ignores_the_weights():
    _, small = original(WEIGHT * 1e-3, fuzzy_lr_distribution="baseline")
    _, large = original(WEIGHT, fuzzy_lr_distribution="baseline")
    assert small.l1_reg() == large.l1_reg()
    assert bf.l1_penalty({"w": WEIGHT * 1e-3}) < bf.l1_penalty({"w": WEIGHT}) / 500


def test_the_original_has_one_sign_per_row_and_columns_of_mixed_signs():
    layer, module = original(apply_dales_principle=True)
    module.dalian_network_initialization(module)
    signs = layer.weight.detach().sign()
    assert (signs == signs[:, :1]).all()
    assert not (signs == signs[:1]).all(0).any()
    state = bf.init({"w": WEIGHT}, KEY, bf.impose_dales_principle)
    params, _, _ = bf.impose_dales_principle({"w": WEIGHT}, {"w": WEIGHT}, state)
    assert (params["w"].sign() == params["w"].sign()[:1]).all()
    assert torch.equal(params["w"].abs(), WEIGHT.abs())


def test_the_original_last_layer_is_left_out_only_as_a_direct_child():
    from bio_transformations import BioConverter

    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU()), torch.nn.Linear(6, 4))
    split = bf.split_synapses(model, 2)
    x = torch.randn(5, 8)
    ours_logits = split(x)
    theirs = BioConverter(weight_splitting_Gamma=2).convert(model)(x)
    assert torch.equal(theirs[:, 0], theirs[:, 1])  # its logits are split: pairs of classes cannot be told apart
    assert not torch.equal(ours_logits[:, 0], ours_logits[:, 1])
