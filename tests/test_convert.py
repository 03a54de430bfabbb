"""The one-line converter: the original's settings, which rule each reaches, and what becomes of the model."""

import copy
import dataclasses
import io
import itertools
import math
import pickle
from functools import partial

import models
import pytest
import torch
from bio_transformations import BioConverter
from bio_transformations import bio_config as original
from helpers import assert_same
from torch import nn
from torch.func import grad, grad_and_value
from torch.nn.functional import cross_entropy

import biofunc as bf
from biofunc import config as config_module

FIELDS = [field.name for field in dataclasses.fields(bf.BioConfig)]
EVERY = ("crystallize", "volume_dependent_lr", "fuzzy_learning_rates", "rejuvenate_weights")
VARIANTS = {"plain": {}, "split": {"weight_splitting_Gamma": 2}, "dale": {"apply_dales_principle": True}}
small_mlp = partial(models.mlp, 6, (8, 8), 4)


def small_conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(64, 10))


def built(make, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count, classes=10):
    return torch.arange(count) % classes


def trained(bio, x, y, steps, params=None, state=None, **signals):
    params, state = bio.params if params is None else params, bio.state if state is None else state
    for _ in range(steps):
        grads = grad(lambda p: cross_entropy(bio.apply(p, x), y))(params)
        params, _, state = bio.learn(params, grads, state, **signals)
    return params, state


def bound(bio):
    """What is bound where: {(rule, keyword): value}, and the periods."""
    values = {(rule.name, name): value for rule in bio.learn.rules for name, value in rule.bound.items()}
    return values | {(rule.name, "every"): rule.wrappers for rule in bio.learn.rules if rule.wrappers}


def names(bio):
    return [rule.name for rule in bio.learn.rules]


def split_layers(bio):
    return [name for name, layer in bio.model.named_modules() if type(layer).__name__.startswith("Split")]


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for path in a:
        torch.testing.assert_close(a[path], b[path], rtol=tolerance, atol=tolerance)


# --- the original's settings ---


def test_every_setting_of_the_original_has_its_name_and_default_here():
    theirs = original.BioConfig()._asdict()
    assert isinstance(theirs.pop("weight_splitting_activation_function"), nn.Identity)
    assert bf.BioConfig().weight_splitting_activation_function is None
    for name, value in theirs.items():
        assert getattr(bf.BioConfig(), name) == value, name
    assert set(FIELDS) - set(theirs) == {
        "mechanisms",
        "rejuvenation_period",
        "weight_splitting_activation_function",
        "weight_splitting_skip",
    }


@pytest.mark.parametrize("distribution", original.Distribution, ids=lambda member: member.value)
def test_settings_of_the_original_convert_with_every_distribution_which_becomes_a_string(distribution):
    settings = original.BioConfig(fuzzy_lr_distribution=distribution, fuzzy_lr_dynamic=True)._asdict()
    bio = bf.convert(built(small_mlp), **settings)
    assert bio.config == bf.BioConfig(**settings)
    assert type(bio.config.fuzzy_lr_distribution) is str
    assert bio.config.fuzzy_lr_distribution == distribution.value
    signals = {}
    if distribution.value == "activity":
        signals["activity"] = bf.record_activity(bio.model)(bio.params, bio.buffers, normal(5, 6))[1]
    params, state = trained(bio, normal(5, 6), labels(5, 4), 3, **signals)
    assert all([torch.isfinite(p).all() and not torch.equal(p, bio.params[name]) for name, p in params.items()])
    assert state.step == 3


def test_the_example_of_the_originals_readme_converts():
    normal_rates = original.Distribution.NORMAL
    settings = original.BioConfig(
        fuzzy_learning_rate_factor_nu=0.16, fuzzy_lr_distribution=normal_rates, fuzzy_lr_dynamic=True,
        dampening_factor=0.6, crystal_thresh=4.5e-05, rejuvenation_parameter_dre=8.0, weight_splitting_Gamma=2,
        weight_splitting_activation_function=nn.ReLU(), base_lr=0.1, stability_factor=2.0, lr_variability=0.2
    )._asdict()  # fmt: skip
    model, x = built(small_mlp), normal(5, 6)
    bio = bf.convert(model, **settings)
    assert bf.convert(model, config=bf.BioConfig(**settings)).config == bio.config
    assert bound(bio)["fuzzy_learning_rates", "distribution"] == "normal"
    assert torch.equal(bio.apply(bio.params, x), bf.split_synapses(model, 2, activation=torch.relu)(x))


# --- each setting reaches its rule ---

TEMPORAL = {"fuzzy_lr_distribution": "temporal", "fuzzy_lr_dynamic": True}
ACTIVITY = {"fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True}
LOGNORMAL = {"mechanisms": ("rejuvenate_weights_lognormal",)}
REACHES = [
    ({}, "fuzzy_learning_rate_factor_nu", 0.3, ("fuzzy_learning_rates", "nu")),
    ({}, "fuzzy_lr_distribution", "beta", ("fuzzy_learning_rates", "distribution")),
    ({}, "fuzzy_lr_min", 0.9, ("fuzzy_learning_rates", "rate_min")),
    ({}, "fuzzy_lr_max", 1.1, ("fuzzy_learning_rates", "rate_max")),
    (TEMPORAL, "fuzzy_learning_rate_factor_nu", 0.3, ("temporal_learning_rates", "nu")),
    (TEMPORAL, "fuzzy_lr_min", 0.9, ("temporal_learning_rates", "rate_min")),
    (TEMPORAL, "fuzzy_lr_max", 1.1, ("temporal_learning_rates", "rate_max")),
    (TEMPORAL, "fuzzy_lr_decay", 0.9, ("temporal_learning_rates", "decay")),
    (TEMPORAL, "fuzzy_lr_update_freq", 7, ("temporal_learning_rates", "every")),
    (ACTIVITY, "fuzzy_learning_rate_factor_nu", 0.3, ("activity_dependent_rates", "nu")),
    (ACTIVITY, "fuzzy_lr_min", 0.9, ("activity_dependent_rates", "rate_min")),
    (ACTIVITY, "fuzzy_lr_max", 1.1, ("activity_dependent_rates", "rate_max")),
    ({}, "dampening_factor", 0.7, ("crystallize", "dampening_factor")),
    ({}, "crystal_thresh", 0.5, ("crystallize", "crystal_thresh")),
    ({}, "rejuvenation_parameter_dre", 4.0, ("rejuvenate_weights", "dre")),
    ({}, "rejuvenation_period", 7, ("rejuvenate_weights", "every")),
    (LOGNORMAL, "rejuvenation_parameter_dre", 4.0, ("rejuvenate_weights_lognormal", "dre")),
    (LOGNORMAL, "rejuvenation_period", 7, ("rejuvenate_weights_lognormal", "every")),
    ({}, "base_lr", 0.5, ("volume_dependent_lr", "base_lr")),
    ({}, "stability_factor", 1.0, ("volume_dependent_lr", "stability_factor")),
    ({}, "lr_variability", 0.1, ("volume_dependent_lr", "lr_variability")),
    ({}, "fuzzy_lr_dynamic", True, None),
    ({}, "fuzzy_lr_decay", 0.9, None),
    ({}, "fuzzy_lr_update_freq", 7, None),
    ({}, "fuzzy_lr_layer_index", 1, None),
    ({}, "fuzzy_lr_total_layers", 3, None),
]
ELSEWHERE = {
    "mechanisms",
    "weight_splitting_Gamma",
    "weight_splitting_skip",
    "weight_splitting_activation_function",
    "apply_dales_principle",
}


@pytest.mark.parametrize(("others", "field", "value", "place"), REACHES)
def test_a_setting_reaches_its_rule_and_no_other(others, field, value, place):
    model = built(small_mlp)
    default, other = bound(bf.convert(model, **others)), bound(bf.convert(model, **others, **{field: value}))
    assert default.keys() == other.keys()
    assert [key for key in other if other[key] != default[key]] == ([place] if place else [])
    if place:
        assert other[place] == ((f"every({value}, ",) if place[1] == "every" else value)


def test_no_setting_is_missing_from_the_table():
    assert {row[1] for row in REACHES} | ELSEWHERE == set(FIELDS)


@pytest.mark.parametrize("field", config_module.MEANINGS)
def test_a_numeric_setting_may_be_a_tensor_and_a_schedule_where_its_rule_takes_one(field):
    others, number, place = next((row[0], row[2], row[3]) for row in REACHES if row[1] == field and row[3])
    # so that each setting matters within three steps
    others = {**others, "rejuvenation_period": 2, "fuzzy_lr_update_freq": 1}
    if field == "dampening_factor":
        others["crystal_thresh"] = 1.0
    model, x, y = built(small_mlp), normal(5, 6), labels(5, 4)
    expected = trained(bf.convert(model, **others, **{field: number}), x, y, 3)
    tensor = torch.tensor(number, dtype=torch.float64)
    bio = bf.convert(model, **others, **{field: tensor})
    assert bound(bio)[place] is tensor
    assert_same(trained(bio, x, y, 3), expected)
    if field in ("fuzzy_learning_rate_factor_nu", "fuzzy_lr_min", "fuzzy_lr_max"):
        with pytest.raises(TypeError, match=f"BioConfig: {field} acts at init and takes no schedule"):
            bf.convert(model, **others, **{field: lambda step: number})
    else:
        assert_same(trained(bf.convert(model, **others, **{field: lambda step: number}), x, y, 3), expected)
    default, _ = trained(bf.convert(model, **others), x, y, 3)
    assert not torch.equal(default["0.weight"], expected[0]["0.weight"])


def test_vmap_tries_values_of_a_setting_by_converting_inside_or_at_the_step():
    model, x, y = built(small_mlp), normal(5, 6), labels(5, 4)
    values = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    convert = partial(bf.convert, model, crystal_thresh=1.0, base_lr=1.0, lr=0.1)  # many synapses settle
    inside = torch.vmap(lambda value: trained(convert(dampening_factor=value), x, y, 5)[0])(values)
    at_step = torch.vmap(lambda value: trained(convert(), x, y, 5, dampening_factor=value)[0])(values)
    for index, value in enumerate(values.tolist()):
        alone = trained(convert(dampening_factor=value), x, y, 5)[0]
        # float64, five steps: matrix products are summed in another order under vmap
        close({name: p[index] for name, p in inside.items()}, alone, 1e-12)
        close({name: p[index] for name, p in at_step.items()}, alone, 1e-12)
    assert not torch.allclose(inside["0.weight"][0], inside["0.weight"][2])


# --- the chain ---

VOLUME, CRYSTAL = partial(bf.volume_dependent_lr, base_lr=0.3), partial(bf.crystallize, crystal_thresh=1e-2)
WITH_VALUES = {"base_lr": 0.3, "crystal_thresh": 1e-2, "rejuvenation_period": 2}
REJUVENATE = bf.every(2, partial(bf.rejuvenate_weights, dre=8.0))
NU0 = partial(bf.fuzzy_learning_rates, nu=0)
BY_HAND = {
    "all": ({}, (CRYSTAL, bf.sgd(), VOLUME, bf.fuzzy_learning_rates, bf.descend(0.05), REJUVENATE)),
    "adam": (
        {"optimizer": bf.adam()},
        (CRYSTAL, bf.adam(), VOLUME, bf.fuzzy_learning_rates, bf.descend(0.05), REJUVENATE),
    ),
    "temporal": (
        {**TEMPORAL, "fuzzy_lr_update_freq": 3},
        (CRYSTAL, bf.sgd(), VOLUME, bf.every(3, bf.temporal_learning_rates), NU0, bf.descend(0.05), REJUVENATE),
    ),
    "crystallize alone": ({"mechanisms": ("crystallize",)}, (CRYSTAL, bf.sgd(), NU0, bf.descend(0.05))),
    "dale": (
        {"mechanisms": ("rejuvenate_weights",), "apply_dales_principle": True},
        (bf.sgd(), bf.descend(0.05), REJUVENATE, partial(bf.enforce_dales_principle, axis={"0.weight": (1, 1)})),
    ),
    "volume alone": ({"mechanisms": ["volume_dependent_lr"]}, (bf.sgd(), VOLUME, bf.descend(0.05))),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_learn_is_bit_for_bit_the_chain_that_one_writes_by_hand(case):
    settings, rules = BY_HAND[case]
    model, x, y = built(small_conv), normal(5, 3, 6, 6), labels(5)
    bio = bf.convert(model, key=bf.random.key(3), lr=0.05, **WITH_VALUES, **settings)
    hand = bf.chain(*rules)
    params = {name: p.detach() for name, p in model.named_parameters()}
    impose = [bf.impose_dales_principle] if case == "dale" else []
    state = bf.init(params, bf.random.key(3), *impose, *hand.rules, where=bf.layers(model, nn.Linear, nn.Conv2d))
    if impose:
        params, _, state = bf.impose_dales_principle(params, params, state)
    assert names(bio) == [rule.name for rule in hand.rules]
    assert [rule.wrappers for rule in bio.learn.rules] == [rule.wrappers for rule in hand.rules]
    assert_same(bio.state, state)
    for _ in range(5):
        grads = grad(lambda p: cross_entropy(torch.func.functional_call(model, p, (x,)), y))(params)
        params, _, state = hand(params, grads, state)
    assert_same(trained(bio, x, y, 5), (params, state))


def test_the_order_of_the_mechanisms_does_not_matter():
    model = built(small_mlp)
    chains = {repr(bf.convert(model, mechanisms=order).learn) for order in itertools.permutations(EVERY)}
    assert len(chains) == 1
    for used in itertools.chain(*[itertools.combinations(EVERY, count) for count in range(5)]):
        applied = {"fuzzy_learning_rates"} if "crystallize" in used else set()
        assert set(names(bf.convert(model, mechanisms=used))) == {*used, *applied, "sgd", "descend"}


def test_no_mechanism_is_plain_sgd():
    model, x, y = built(small_mlp), normal(5, 6), labels(5, 4)
    bio = bf.convert(model, mechanisms=(), lr=0.1)
    params, _ = trained(bio, x, y, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    close(params, {name: p.detach() for name, p in model.named_parameters()}, 1e-12)  # float64, 20 steps


# --- the model given ---


def structure(model):
    tensors = [
        (name, id(t), t.grad, t.requires_grad) for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return tensors, [
        (n, type(m), m.training, list(m._forward_hooks), sorted(vars(m))) for n, m in model.named_modules()
    ]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_the_model_given_stays_as_it_is(settings):
    model = built(partial(models.ResNet18, 4))
    model.blocks[0].bn1.eval()
    handle = model.head.register_forward_hook(lambda *_: None)
    before, values = structure(model), copy.deepcopy(model.state_dict())
    bio = bf.convert(model, **settings)
    x, params, buffers = normal(4, 3, 8, 8), bio.params, bio.buffers
    assert bio.model.blocks[0].bn1.training is False
    assert bio.model.training is True
    for _ in range(2):
        grads, buffers = grad(lambda p, b: loss_and_buffers(bio, p, b, x), has_aux=True)(params, buffers)
        params, _, _ = bio.learn(params, grads, bio.state)
    bio.model.eval()
    assert structure(model) == before
    assert_same(dict(model.state_dict()), dict(values))
    handle.remove()
    assert structure(model) != before


def loss_and_buffers(bio, params, buffers, x):
    logits, buffers = bio.apply_and_update(params, buffers, x)
    return cross_entropy(logits, labels(len(x))), buffers


def test_later_changes_of_the_model_reach_nothing():
    model = built(partial(models.ResNet18, 4))
    bio = bf.convert(model)
    params, buffers = copy.deepcopy(bio.params), copy.deepcopy(bio.buffers)
    x = normal(4, 3, 8, 8)
    logits = bio.apply(bio.params, x)
    for changed in (model, bio.model):
        changed(normal(4, 3, 8, 8, seed=1))
    model.eval()
    with torch.no_grad():
        for p in [*model.parameters(), *bio.model.parameters()]:
            p.fill_(7.0)
    assert_same((bio.params, bio.buffers), (params, buffers))
    assert torch.equal(bio.apply(bio.params, x), logits)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_converting_twice_gives_the_same_and_another_key_other_noise(settings):
    model, x, y = built(small_mlp), normal(5, 6), labels(5, 4)
    once, twice, other = [bf.convert(model, key=key, **settings) for key in (None, bf.random.key(0), bf.random.key(1))]
    assert_same((once.params, once.state), (twice.params, twice.state))
    assert_same(trained(once, x, y, 3), trained(twice, x, y, 3))
    assert not torch.equal(trained(once, x, y, 3)[0]["0.weight"], trained(other, x, y, 3)[0]["0.weight"])


@pytest.mark.parametrize(
    ("make", "arguments"),
    [(nn.Linear, (4, 3)), (partial(nn.Linear, 4, out_features=3), ()), (lambda n, m: nn.Linear(n, m), (4, 3))],
    ids=["class", "partial", "lambda"],
)
def test_a_class_or_function_makes_the_model_and_stays_as_it_is(make, arguments):
    before, init = dict(vars(nn.Linear)), nn.Linear.__init__
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bio = bf.convert(make, *arguments)
    made = built(partial(nn.Linear, 4, 3), dtype=torch.float32)
    assert_same(bio.params, {name: p.detach() for name, p in made.named_parameters()})
    assert type(bio.model) is nn.Linear
    assert nn.Linear.__init__ is init
    assert dict(vars(nn.Linear)) == before
    assert "bio_mod" not in dict(made.named_modules())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: 3, (), "made int; it must make an nn.Module"),
        (lambda: nn.Linear, (), "made type; it must make an nn.Module"),
        (3, (), "model is int; give an nn.Module"),
        (nn.ReLU(), (1, 2), "takes no arguments, and 2 were given"),
    ],
)
def test_what_makes_no_module_is_refused(model, arguments, message):
    with pytest.raises(TypeError, match=message):
        bf.convert(model, *arguments)


def test_a_lazy_layer_is_refused():
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        bf.convert(built(lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))))


# --- which synapses ---


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.norm = nn.Embedding(7, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, tokens):
        x = self.norm(self.conv(self.embed(tokens).mT).mT)
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


ARCHITECTURES = {"mlp": small_mlp, "resnet": partial(models.ResNet18, 4), "encoder": models.Encoder, "zoo": Zoo}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_synapses_are_the_weights_of_the_layers_that_the_original_marks(name):
    model = built(ARCHITECTURES[name])
    bio = bf.convert(model)
    with torch.random.fork_rng(devices=[]):
        marked = [path for path, layer in BioConverter()(model).named_modules() if hasattr(layer, "bio_mod")]
    assert set(bio.state.plasticity) == {f"{path}.weight" for path in marked}
    if name == "zoo":
        assert marked == ["attention.out_proj"]


def test_where_selects_other_synapses_and_reaches_init():
    model = built(Zoo)
    weights = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    bio = bf.convert(model, where="*weight")
    assert set(bio.state.plasticity) == set(weights)
    assert {"embed.weight", "conv.weight", "norm.weight", "attention.in_proj_weight"} < set(weights)
    assert set(bio.init(bio.params, bf.random.key(1))[1].plasticity) == set(weights)
    grads = {name: torch.ones_like(p) for name, p in bio.params.items()}
    params, _, _ = bio.learn(bio.params, grads, bio.state)
    moved = bio.params["norm.weight"] - params["norm.weight"]
    assert moved.std() > 0  # rates of its own
    assert (bio.params["norm.bias"] - params["norm.bias"]).std() < 1e-15


def test_a_model_without_synapses_and_a_where_that_selects_none_are_refused():
    model = built(lambda: nn.Sequential(nn.Conv1d(4, 4, 1)))
    with pytest.raises(ValueError, match=r"no layer of type Linear, Conv2d; name its synapses, where='\*\.weight'"):
        bf.convert(model)
    assert list(bf.convert(model, where="*.weight").state.plasticity) == ["0.weight"]
    with pytest.raises(ValueError, match=r"where='fc\*' selects no synapse; the paths are: 0\.weight, 0\.bias"):
        bf.convert(model, where="fc*")


# --- splitting ---


@pytest.mark.parametrize("gamma", [0, 1])
def test_one_contact_leaves_the_function_as_it_is(gamma):
    model, x = built(small_mlp), normal(5, 6)
    bio = bf.convert(model, weight_splitting_Gamma=gamma, weight_splitting_activation_function=torch.tanh)
    assert torch.equal(bio.apply(bio.params, x), model(x))


@pytest.mark.parametrize("activation", [None, torch.tanh, nn.ReLU()], ids=["identity", "tanh", "relu"])
def test_two_contacts_are_split_synapses_of_all_but_the_last_layer(activation):
    for make, shape in ((small_mlp, (5, 6)), (small_conv, (5, 3, 6, 6))):
        model, x = built(make), normal(*shape)
        bio = bf.convert(model, weight_splitting_Gamma=2, weight_splitting_activation_function=activation)
        split = bf.split_synapses(model, 2, activation=activation, skip="last")
        assert torch.equal(bio.apply(bio.params, x), split(x))
        assert not torch.equal(split(x), model(x))
        assert list(bio.params) == [name for name, _ in model.named_parameters()]


def test_only_selected_layers_that_are_called_are_split():
    two = {"weight_splitting_Gamma": 2}
    assert split_layers(bf.convert(built(small_mlp), **two, where="[02].weight")) == ["0"]  # 2 is the last of them
    assert split_layers(bf.convert(built(small_mlp), **two, where="[24].weight")) == ["2"]
    linears = [f"encoder.layers.{layer}.linear{half}" for layer in (0, 1) for half in (1, 2)]
    assert split_layers(bf.convert(built(models.Encoder), **two)) == linears
    with_conv1d = built(lambda: nn.Sequential(nn.Conv1d(4, 4, 1), small_mlp()))
    assert split_layers(bf.convert(with_conv1d, **two)) == ["1.0", "1.2"]


def test_layers_that_cannot_be_split_are_refused_by_name():
    with pytest.raises(ValueError, match="gamma is 3 and does not divide the 8 outputs of layer '0'"):
        bf.convert(built(small_mlp), weight_splitting_Gamma=3)
    for make in (partial(nn.Linear, 4, 4), lambda: nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(ValueError, match="no layer is left to split"):
            bf.convert(built(make), weight_splitting_Gamma=2)


# --- Dale's principle ---


def by_neuron(w, place):
    """The weights by group, presynaptic neuron, and the rest."""
    dim, groups = place
    return w.unflatten(0, (groups, -1)).movedim(dim + 1, 1).flatten(2)


def assert_dale(params, state, axes):
    for path in state.plasticity:
        w = by_neuron(params[path], axes[path])
        assert not ((w > 0).any(2) & (w < 0).any(2)).any(), path


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.ones(1, 4))

    def forward(self, x):
        return self.gain * (x @ self.w.T)


DALIAN = {
    "mlp": (small_mlp, (5, 6), None),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 4)), (5, 4, 3, 3), None),
    "custom": (Custom, (5, 6), "w"),
}


@pytest.mark.parametrize("name", DALIAN)
def test_presynaptic_neurons_have_one_sign_from_the_start_and_while_learning(name):
    make, shape, where = DALIAN[name]
    model = built(make)
    bio = bf.convert(model, apply_dales_principle=True, rejuvenation_period=4, lr=5.0, base_lr=1.0, where=where)
    axes = {"w": (1, 1)} if name == "custom" else bf.presynaptic_axes(model)
    assert_dale(bio.params, bio.state, axes)
    for path, before in model.named_parameters():
        assert torch.equal(bio.params[path], before) == (path not in bio.state.plasticity)
        if path in bio.state.plasticity:
            w = by_neuron(before.detach(), axes[path])
            assert torch.equal(by_neuron(bio.params[path], axes[path]), w.abs() * w.sum(2, keepdim=True).sign())
    params, state, silenced = bio.params, bio.state, 0
    for _ in range(10):
        params, state = trained(bio, normal(*shape), labels(5, 4), 1, params, state)
        assert_dale(params, state, axes)
        silenced += sum([(params[path] == 0).sum() for path in state.plasticity])
    assert silenced > 0


# --- running the model ---


def test_batch_statistics_stay_with_apply_and_come_back_from_apply_and_update():
    model, x = built(partial(models.ResNet18, 4)), normal(4, 3, 8, 8)
    bio = bf.convert(model)
    before = copy.deepcopy(bio.buffers)
    y = bio.apply(bio.params, x)
    again, buffers = bio.apply_and_update(bio.params, bio.buffers, x)
    assert_same((bio.buffers, dict(bio.model.named_buffers()), dict(model.named_buffers())), (before,) * 3)
    assert torch.equal(model(x), y)
    assert torch.equal(again, y)
    assert_same(buffers, dict(model.named_buffers()))
    assert buffers["stem.1.num_batches_tracked"] == 1
    bio.model.eval()
    model.eval()
    logits, unchanged = bio.apply_and_update(bio.params, buffers, x)
    assert torch.equal(logits, model(x))
    assert_same(unchanged, buffers)


@pytest.mark.parametrize("batched", ["params", "input", "keyword", "buffers"])
def test_batch_statistics_are_members_own_under_vmap(batched):
    class Keyword(nn.Sequential):
        def forward(self, x):
            return super().forward(x.real)

    bio = bf.convert(built(lambda: Keyword(nn.Linear(6, 4), nn.BatchNorm1d(4))))
    x = normal(3, 5, 6) if batched in ("input", "keyword") else normal(5, 6)
    grow = torch.arange(1.0, 4.0, dtype=torch.float64)
    params = {name: torch.stack([p * s for s in grow]) if batched == "params" else p for name, p in bio.params.items()}
    buffers = dict(bio.buffers)
    if batched == "buffers":
        buffers = {name: torch.stack([(b + s).to(b) for s in grow]) for name, b in buffers.items()}
    if batched == "keyword":
        x = x.to(torch.complex128)
        together = torch.vmap(lambda x: bio.apply_and_update(params, buffers, x=x))(x)
    else:
        dims = tuple([0 if name == batched else None for name in ("params", "buffers", "input")])
        together = torch.vmap(bio.apply_and_update, in_dims=dims)(params, buffers, x)
    for i in range(3):
        p, b = [
            {name: leaf[i] for name, leaf in tree.items()} if batched == kind else tree
            for kind, tree in (("params", params), ("buffers", buffers))
        ]
        y, new = bio.apply_and_update(p, b, x[i] if batched in ("input", "keyword") else x)
        torch.testing.assert_close(together[0][i], y, rtol=1e-12, atol=1e-12)  # float64, another order of summation
        close({name: b[i] for name, b in together[1].items()}, new, 1e-12)


def test_keywords_reach_the_model_and_gradients_flow_to_parameters_and_inputs():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale=1.0):
            return scale * super().forward(x)

    bio, x = bf.convert(built(partial(Scaled, 4, 3))), normal(5, 4)
    assert bio.buffers == {}
    assert bio.apply_and_update(bio.params, {}, x)[1] == {}
    assert torch.equal(bio.apply(bio.params, x, scale=2.0), 2 * bio.apply(bio.params, x))
    slopes = grad(lambda p, x: bio.apply(p, x, scale=2.0).sum(), argnums=(0, 1))(bio.params, x)
    torch.testing.assert_close(slopes[0]["weight"], 2 * x.sum(0).expand(3, 4))
    torch.testing.assert_close(slopes[1], 2 * bio.params["weight"].sum(0).expand(5, 4))


# --- ensembles ---


@pytest.mark.parametrize("dale", [False, True])
def test_a_member_of_an_ensemble_starts_as_it_does_alone(dale):
    bio = bf.convert(built(small_mlp), apply_dales_principle=dale, optimizer=bf.adam())
    members = [{name: p.detach() for name, p in built(small_mlp, seed).named_parameters()} for seed in range(3)]
    keys = bf.random.key(torch.arange(3))
    together = torch.vmap(bio.init)(bf.ensemble.stack(members), keys)
    for member, given, key in zip(bf.ensemble.unstack(together), members, keys, strict=True):
        assert_same(member, bio.init(given, key))
    assert not torch.equal(together[1].plasticity["0.weight"][0], together[1].plasticity["0.weight"][1])
    assert_same(bio.init(members[0], bf.random.key(0)), (bio.params, bio.state))


TRAINED = {"mlp": (small_mlp, (8, 6)), "resnet": (partial(models.ResNet18, 4), (8, 3, 16, 16))}
TRAINED["encoder"] = (models.Encoder, (8, 5, 16))


def ensemble(name, variant, **settings):
    """A converted model with Adam, its training step, three members and their keys."""
    make, shape = TRAINED[name]
    settings = {"base_lr": 1.0, "lr": 0.003, "optimizer": bf.adam(), **VARIANTS[variant], **settings}
    bio = bf.convert(built(make), **settings)
    x, y = normal(*shape), labels(shape[0], 4)
    members = [{path: p.detach() for path, p in built(make, seed).named_parameters()} for seed in range(3)]
    params, state = torch.vmap(bio.init)(bf.ensemble.stack(members), bf.random.key(torch.arange(3)))

    def step(params, state):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            grads, loss = grad_and_value(lambda p: cross_entropy(bio.apply(p, x), y))(params)
        params, _, state = bio.learn(params, grads, state)
        return params, state, loss

    return step, params, state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TRAINED)
def test_fifty_steps_with_every_mechanism_learn_and_members_are_alone(name, variant):
    step, params, state = ensemble(name, variant, rejuvenation_period=10)
    without, _, _ = ensemble(name, variant, rejuvenation_period=10, rejuvenation_parameter_dre=math.inf)
    alone = bf.ensemble.unstack((params, state))[1]
    kept, losses, ensemble_step = alone, [], torch.vmap(step)
    for index in range(50):
        params, state, loss = ensemble_step(params, state)
        alone = step(*alone)[:2]
        losses.append(loss)
        if index < 10:
            kept = without(*kept)[:2]
        if index in (8, 9):
            same = [torch.equal(alone[0][path], kept[0][path]) for path in state.plasticity]
            assert all(same) == (index == 8)  # synapses are re-drawn at the tenth step
    losses = torch.stack(losses)
    assert all([torch.isfinite(p).all() for p in params.values()])
    assert losses.isfinite().all()
    assert (losses[49] < losses[0]).all()  # the loss before the 50th step, at which synapses turn over again
    # float64: another order of summation under vmap, amplified by 50 steps of training
    close({path: p[1] for path, p in params.items()}, alone[0], 1e-9)


@pytest.mark.parametrize(
    ("name", "variant", "steps"),
    [("mlp", "plain", 3), ("mlp", "dale", 3), ("encoder", "plain", 3), ("resnet", "plain", 1)],
)
def test_compiled_steps_of_an_ensemble_are_the_eager_ones(name, variant, steps):
    step, params, state = ensemble(name, variant, rejuvenation_period=min(steps, 2))
    torch._dynamo.reset()
    eager, compiled = torch.vmap(step), torch.compile(torch.vmap(step), backend="aot_eager", fullgraph=True)
    left = right = (params, state)
    for _ in range(steps):
        left, right = eager(*left)[:2], compiled(*right)[:2]
    close(left[0], right[0], 1e-10)  # float64, up to three steps of Adam on gradients summed in another order
    close(left[1].plasticity, right[1].plasticity, 1e-10)


# --- distributions of rates that need more than a name ---


def test_activity_dependent_rates_need_the_signal_and_follow_it():
    bio, x, y = bf.convert(built(small_mlp), **ACTIVITY), normal(5, 6), labels(5, 4)
    with pytest.raises(TypeError, match="activity is missing"):
        trained(bio, x, y, 10)
    record = bf.record_activity(bio.model)

    def loss(params):
        logits, activity = record(params, bio.buffers, x)
        return cross_entropy(logits, y), activity

    params, state = bio.params, bio.state
    for _ in range(10):
        grads, activity = grad(loss, has_aux=True)(params)
        params, _, state = bio.learn(params, grads, state, activity=activity)
    assert all([rate.std() > 0.01 for rate in state.plasticity.values()])
    assert all([(rate == 1).all() for rate in bio.state.plasticity.values()])


@pytest.mark.parametrize("distribution", ["temporal", "activity"])
def test_distributions_that_change_need_dynamic(distribution):
    with pytest.raises(ValueError, match=f"fuzzy_lr_distribution is '{distribution}' and fuzzy_lr_dynamic False"):
        bf.convert(built(small_mlp), fuzzy_lr_distribution=distribution)


def test_layer_adaptive_rates_differ_less_in_later_layers():
    model = built(lambda: nn.ModuleDict({name: nn.Linear(64, 64) for name in ("z", "k", "a")}))
    bio = bf.convert(model, fuzzy_lr_distribution="layer_adaptive")
    widths = [(bio.state.plasticity[f"{name}.weight"] - 1).abs().max().item() for name in ("z", "k", "a")]
    expected = [0.16 * (1 - layer / 6) for layer in range(3)]
    # the largest of 4096 uniforms misses the bound by more than 1 % with probability 0.99^4096 = 1e-18
    assert all([0.99 * e < w <= e for w, e in zip(widths, expected, strict=True)])


def test_a_function_may_be_the_distribution():
    model = built(small_mlp)
    bio = bf.convert(model, fuzzy_lr_distribution=lambda key, w, nu, path: torch.full_like(w, 1 + (path[0] == "2") / 2))
    assert [rate.unique().tolist() for rate in bio.state.plasticity.values()] == [[1.0], [1.5], [1.0]]


# --- BioConfig ---


def test_a_config_is_a_frozen_value():
    config = bf.BioConfig(base_lr=0.5, mechanisms=["crystallize"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.base_lr = 0.1
    given = {name: getattr(config, name) for name in FIELDS}
    twins = [copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), bf.BioConfig(**given)]
    assert all([twin == config and hash(twin) == hash(config) for twin in twins])
    changed = dataclasses.replace(config, base_lr=0.1)
    assert (changed.base_lr, config.base_lr) == (0.1, 0.5)
    assert changed != config
    bio = bf.convert(built(small_mlp), config=config, crystal_thresh=1e-3)
    assert bio.config == dataclasses.replace(config, crystal_thresh=1e-3)
    object.__setattr__(config, "mechanisms", ())
    given["mechanisms"] = ()
    assert names(bio) == ["crystallize", "sgd", "fuzzy_learning_rates", "descend"]
    assert bio.config.mechanisms == ("crystallize",)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("crystal_treshold", "crystal_thresh"), ("weight_splitting_gamma", "weight_splitting_Gamma"), ("nu", None)],
)
def test_an_unknown_setting_is_refused_with_the_nearest_one(wrong, right):
    hint = f"there is no setting '{wrong}'; " + (f"did you mean '{right}'" if right else "")
    for call in (bf.BioConfig, partial(dataclasses.replace, bf.BioConfig()), partial(bf.convert, nn.ReLU())):
        with pytest.raises(TypeError, match=hint):
            call(**{wrong: 1})


@pytest.mark.parametrize(
    ("wrong", "right"), [("optimiser", "optimizer"), ("keys", "key"), ("were", "where"), ("configs", "config")]
)
def test_a_near_miss_of_a_keyword_of_convert_is_refused_with_that_keyword(wrong, right):
    with pytest.raises(TypeError, match=f"no setting '{wrong}'; did you mean '{right}'"):
        bf.convert(built(small_mlp), **{wrong: None})


OUT_OF_RANGE = {
    "fuzzy_learning_rate_factor_nu": (-0.1, 1.0),
    "fuzzy_lr_min": (-0.1, 1.1),
    "fuzzy_lr_max": (0.9,),
    "fuzzy_lr_decay": (-0.1, 1.1),
    "dampening_factor": (0.0, 1.1),
    "crystal_thresh": (-1e-9, math.inf),
    "rejuvenation_parameter_dre": (0.0, -1),
    "base_lr": (0.0, math.inf),
    "stability_factor": (-1, math.inf),
    "lr_variability": (-0.1, math.inf),
    "fuzzy_lr_update_freq": (0,),
    "rejuvenation_period": (0, -1),
    "weight_splitting_Gamma": (-1,),
}
NUMBERS = ("0.5", None, True, torch.ones(2))
WRONG_TYPE = {
    **dict.fromkeys(config_module.MEANINGS, NUMBERS),
    **dict.fromkeys(("fuzzy_lr_update_freq", "rejuvenation_period", "weight_splitting_Gamma"), (2.0, "2", None, True)),
    **dict.fromkeys(("fuzzy_lr_layer_index", "fuzzy_lr_total_layers"), (0.5, "x", None)),
    "fuzzy_lr_distribution": (3, None, "unifrom", torch.ones(2)),
    "fuzzy_lr_dynamic": (1, None, "yes"),
    "weight_splitting_skip": (3, (3,)),
    "apply_dales_principle": (0, None),
    "weight_splitting_activation_function": ("relu", 3, nn.ReLU),
    "mechanisms": ("crystallize", ("crystalize",), (3,), None, 3),
}
BAD = [(field, value, ValueError) for field, values in OUT_OF_RANGE.items() for value in values]
BAD += [(field, math.nan, (TypeError, ValueError)) for field in OUT_OF_RANGE]
BAD += [(field, value, (TypeError, ValueError)) for field, values in WRONG_TYPE.items() for value in values]


@pytest.mark.parametrize(("field", "value", "error"), BAD, ids=lambda value: str(value)[:30])
def test_a_value_that_a_field_cannot_have_is_refused_by_name(field, value, error):
    with pytest.raises(error, match=f"BioConfig: .*{field}"):
        bf.BioConfig(**{field: value})


def test_every_field_is_in_the_table_of_refusals():
    assert OUT_OF_RANGE.keys() | WRONG_TYPE.keys() == set(FIELDS)


def test_dales_principle_with_several_contacts_is_refused():
    with pytest.raises(ValueError, match="apply_dales_principle with weight_splitting_Gamma=2"):
        bf.convert(built(small_mlp), apply_dales_principle=True, weight_splitting_Gamma=2)
    assert bf.BioConfig(apply_dales_principle=True, weight_splitting_Gamma=1).apply_dales_principle


# --- what is made ---


def test_what_is_made_can_be_copied_and_saved_and_says_what_it_does():
    x, y = normal(5, 6), labels(5, 4)
    bio = bf.convert(built(small_mlp), weight_splitting_Gamma=2, rejuvenation_period=2)
    twin = copy.deepcopy(bio)
    assert twin.model is not bio.model
    assert_same(trained(twin, x, y, 3), trained(bio, x, y, 3))
    file = io.BytesIO()
    torch.save(trained(bio, x, y, 1), file)
    file.seek(0)
    params, state = torch.load(file, weights_only=False)
    assert_same(trained(bio, x, y, 2, params=params, state=state), trained(bio, x, y, 3))
    assert repr(bio) == f"convert(Sequential, 6 parameters, learn={bio.learn!r})"
    assert "every(2, rejuvenate_weights(dre=8.0))" in repr(bio)


def test_a_bfloat16_model_keeps_its_dtypes():
    bio = bf.convert(built(small_mlp, dtype=torch.bfloat16), rejuvenation_period=2, base_lr=1.0, lr=0.1)
    params, state = trained(bio, normal(5, 6, dtype=torch.bfloat16), labels(5, 4), 3)
    assert {p.dtype for p in params.values()} == {torch.bfloat16}
    assert {rate.dtype for rate in state.plasticity.values()} == {torch.float32}
    assert all([p.isfinite().all() and not torch.equal(p, bio.params[path]) for path, p in params.items()])


def test_activity_dependent_rates_leave_out_a_projection_that_is_never_called():
    model = built(models.Encoder)
    bio = bf.convert(model, fuzzy_lr_distribution="activity", fuzzy_lr_dynamic=True)
    x = normal(4, 5, 16)
    _, activity = bf.record_activity(bio.model)(bio.params, bio.buffers, x)
    state = bio.state
    for _ in range(10):
        _, _, state = bio.learn(bio.params, bio.params, state, activity=activity)
    drawn = state.slots["activity_dependent_rates"]["innate"]
    assert "encoder.layers.0.self_attn.out_proj.weight" not in drawn
    assert drawn["encoder.layers.0.linear1.weight"].std() > 0.01


def test_frozen_parameters_stay_in_the_model():
    model = built(small_mlp)
    model[2].requires_grad_(False)
    bio = bf.convert(model, lr=1.0, base_lr=1.0)
    assert set(bio.params) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    params, _ = trained(bio, normal(5, 6), labels(5, 4), 3)
    assert torch.equal(bio.model[2].weight, model[2].weight)
    assert not torch.equal(params["0.weight"], model[0].weight)
    with pytest.raises(KeyError, match=r"params has '2\.weight'"):
        bio.init(dict(model.named_parameters()), bf.random.key(1))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all its synapses are frozen"):
        bf.convert(model)


def test_other_parameters_than_those_of_the_conversion_are_refused():
    bio, x = bf.convert(built(small_mlp)), normal(5, 6)
    misspelt = {("0.weigth" if name == "0.weight" else name): p for name, p in bio.params.items()}
    for call in (lambda p: bio.apply(p, x), lambda p: bio.init(p, bf.random.key(0))):
        with pytest.raises(KeyError, match=r"'0\.weigth'.*did you mean '0\.weight'"):
            call(misspelt)
        with pytest.raises(KeyError, match=r"params lacks '0\.weight'"):
            call({})


def test_buffers_that_a_model_assigns_are_updated_too():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

        def forward(self, x):
            y = self.layer(x)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y

    bio, x = bf.convert(built(Running)), normal(5, 6)
    y, buffers = bio.apply_and_update(bio.params, bio.buffers, x)
    assert torch.equal(buffers["mean"], 0.1 * y.mean(0))
    assert not bio.buffers["mean"].any()


@pytest.mark.parametrize("given", ["adam", bf.crystallize, bf.descend(0.1), torch.optim.Adam], ids=range(4))
def test_what_is_no_optimizer_is_refused_with_one_that_is(given):
    with pytest.raises(TypeError, match=r"bf\.adam"):
        bf.convert(built(small_mlp), optimizer=given)


def test_compiled_models_convert_as_the_bare_one():
    model = built(small_mlp)
    bio, bare = bf.convert(torch.compile(model, backend="eager")), bf.convert(model)
    assert_same(bio.params, bare.params)
    assert_same(bio.state, bare.state)
