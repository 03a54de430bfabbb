"""Weight splitting: the formula as a scalar loop, which layers it takes, and what a module must survive."""

import copy
import itertools
import math
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.func import functional_call, grad

import biofunc as bf


def built(make, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)


def normal(*shape, seed=0):
    return bf.random.normal(bf.random.key(seed), shape, dtype=torch.float64)


def group_sums(y, gamma, dim, activation=lambda value: value):
    """z[j gamma ... (j+1) gamma - 1] = sum over the group j of activation(y), one number at a time."""
    z = torch.full_like(y, math.nan)
    for index in itertools.product(*[range(size) for size in y.shape]):
        first = index[dim] // gamma * gamma
        group = [(*index[:dim], member, *index[dim + 1 :]) for member in range(first, first + gamma)]
        z[index] = sum(activation(y[contact].item()) for contact in group)
    return z


def linear_outputs(layer, x):
    """W x + b for one input vector, one number at a time."""
    weight, bias, x = layer.weight.tolist(), layer.bias.tolist(), x.tolist()
    return torch.tensor(
        [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)],
        dtype=torch.float64,
    )


def mlp(sizes=(6, 8, 8, 3)):
    layers = [module for n, m in itertools.pairwise(sizes) for module in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class BackboneAndHead(nn.Module):
    """The last layer lies two modules deep."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.ModuleDict({"inner": nn.Linear(6, 4)})["inner"])
        self.head = nn.Sequential(nn.Tanh(), nn.Sequential(nn.Linear(4, 3)))

    def forward(self, x):
        return self.head(self.backbone(x))


def hooked(model):
    return [name for name, module in model.named_modules() if module._forward_hooks]


def same(a, b, tolerance=1e-13):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the formula ---


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5)], ids=lambda shape: f"rank{len(shape)}")
@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["identity", "tanh"])
def test_linear_sums_and_repeats_consecutive_outputs_for_inputs_of_any_rank(shape, activation):
    model = built(lambda: nn.Linear(5, 6))
    split = bf.split_synapses(model, 3, activation=activation, skip=None)
    x = normal(*shape)
    y = torch.stack([linear_outputs(model, row) for row in x.reshape(-1, 5)]).reshape(*shape[:-1], 6)
    z = split(x)
    assert z.shape == y.shape
    same(z, group_sums(y, 3, y.dim() - 1, math.tanh if activation else lambda value: value))


CONVS = {
    "conv1d": (lambda: nn.Conv1d(2, 6, 3), (2, 7)),
    "conv1d_grouped": (lambda: nn.Conv1d(4, 8, 2, groups=4), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 6, 3, padding=1), (2, 4, 3)),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 8, (1, 2), groups=2), (4, 3, 4)),
    "conv2d_one_pixel": (lambda: nn.Conv2d(2, 4, 3), (2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=2), (2, 4, 3, 3)),
    "conv3d_grouped": (lambda: nn.Conv3d(2, 4, (2, 1, 1), groups=2, bias=False), (2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["identity", "tanh"])
def test_convolutions_sum_and_repeat_consecutive_channels(name, batch, activation):
    make, shape = CONVS[name]
    model = built(make)
    x = normal(*batch, *shape)
    z = bf.split_synapses(model, 2, activation=activation, skip=None)(x)
    same(z, group_sums(model(x).detach(), 2, len(batch), math.tanh if activation else lambda value: value))


@given(
    gamma=st.integers(1, 5),
    groups=st.integers(1, 4),
    inputs=st.integers(1, 5),
    batch=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_all_contacts_of_a_group_carry_its_sum(gamma, groups, inputs, batch, seed):
    model = built(lambda: nn.Linear(inputs, gamma * groups), seed)
    x = normal(*batch, inputs, seed=seed)
    y = model(x).detach()
    same(bf.split_synapses(model, gamma, skip=None)(x), group_sums(y, gamma, y.dim() - 1))


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 6), lambda: nn.Conv1d(2, 6, 3)], ids=["linear", "conv1d"])
def test_an_empty_batch_stays_an_empty_batch(make):
    model = built(make)
    x = torch.zeros(0, 5, dtype=torch.float64) if isinstance(model, nn.Linear) else normal(0, 2, 7)
    assert bf.split_synapses(model, 2, skip=None)(x).shape == model(x).shape


def test_gamma_one_is_the_identity():
    model, x = built(mlp), normal(4, 6)
    assert torch.equal(bf.split_synapses(model, 1, skip=None)(x), model(x))


def test_gamma_one_with_an_activation_applies_the_activation_alone():
    model, x = built(lambda: nn.Linear(6, 5)), normal(4, 6)
    assert torch.equal(bf.split_synapses(model, 1, activation=torch.tanh, skip=None)(x), torch.tanh(model(x)))


def test_gamma_of_all_outputs_gives_one_number_per_input():
    model, x = built(lambda: nn.Linear(6, 4)), normal(3, 6)
    z = bf.split_synapses(model, 4, skip=None)(x)
    same(z, model(x).sum(1, keepdim=True).expand(3, 4))


def test_each_split_layer_feeds_the_next():
    model, x = built(mlp), normal(2, 6)
    y = group_sums(model[0](x).detach(), 2, 1).relu()
    y = group_sums(model[2](y).detach(), 2, 1).relu()
    same(bf.split_synapses(model)(x), model[4](y))


def test_default_gamma_is_two():
    model, x = built(mlp), normal(2, 6)
    assert torch.equal(bf.split_synapses(model)(x), bf.split_synapses(model, 2)(x))


# --- the model and its copy ---


def test_names_shapes_and_values_of_the_parameters_are_the_models():
    model = built(BackboneAndHead)
    split = bf.split_synapses(model)
    assert type(split) is BackboneAndHead
    assert list(split.state_dict()) == list(model.state_dict())
    for name, parameter in split.named_parameters():
        original = model.get_parameter(name)
        assert torch.equal(parameter, original)
        assert parameter.data_ptr() != original.data_ptr()


def test_the_model_stays_as_it_is():
    model, x = built(mlp), normal(3, 6)
    before, outputs = copy.deepcopy(model.state_dict()), model(x)
    split = bf.split_synapses(model, 2, activation=torch.tanh)
    with torch.no_grad():
        for parameter in split.parameters():
            parameter.zero_()
    assert hooked(model) == []
    assert hooked(split) == ["0", "2"]
    assert torch.equal(model(x), outputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_functional_call_takes_the_models_own_parameters():
    model, other, x = built(mlp, 0), built(mlp, 1), normal(3, 6)
    split = bf.split_synapses(model)
    through = functional_call(split, dict(other.named_parameters()), (x,))
    assert torch.equal(through, bf.split_synapses(other)(x))
    assert not torch.equal(through, split(x))


# --- which layers are split ---


def test_the_last_layer_is_skipped_at_any_depth():
    assert hooked(bf.split_synapses(built(BackboneAndHead))) == ["backbone.0", "backbone.2"]


def test_skip_none_splits_all_layers():
    split = bf.split_synapses(built(BackboneAndHead), 3, skip=["backbone.2"])
    assert hooked(split) == ["backbone.0", "head.1.0"]
    assert hooked(bf.split_synapses(built(mlp, dtype=torch.float32), 1, activation=torch.tanh, skip=None)) == [
        "0",
        "2",
        "4",
    ]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("head.*", ["backbone.0", "backbone.2"]),
        ("backbone.*", ["head.1.0"]),
        (["backbone.0", "head.*"], ["backbone.2"]),
        (("*.2",), ["backbone.0", "head.1.0"]),
        ([], ["backbone.0", "backbone.2", "head.1.0"]),
    ],
)
def test_skip_takes_globs_on_layer_names(skip, left):
    assert hooked(bf.split_synapses(built(BackboneAndHead), 1, activation=torch.tanh, skip=skip)) == left


def test_layers_of_other_kinds_are_not_split():
    model = built(
        lambda: nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ConvTranspose1d(3, 4, 2))
    )
    assert hooked(bf.split_synapses(model, 2, skip=None)) == ["2"]


def test_a_layer_used_twice_is_hooked_once():
    shared = built(lambda: nn.Linear(4, 4))
    model = nn.Sequential(shared, nn.Tanh(), shared, built(lambda: nn.Linear(4, 3), 1))
    split = bf.split_synapses(model)
    assert split[0] is split[2]
    assert len(split[0]._forward_hooks) == 1
    x = normal(2, 4)
    y = group_sums(shared(x).detach(), 2, 1).tanh()
    same(split(x), model[3](group_sums(shared(y).detach(), 2, 1)))


def test_inputs_need_not_be_divisible():
    model, x = built(lambda: nn.Linear(15, 10)), normal(2, 15)
    same(bf.split_synapses(model, 2, skip=None)(x), group_sums(model(x).detach(), 2, 1))


# --- refusals ---


def test_gamma_that_does_not_divide_the_outputs_names_layer_and_numbers():
    with pytest.raises(ValueError, match=r"gamma is 4 and does not divide the 6 outputs of layer 'backbone\.0'"):
        bf.split_synapses(built(BackboneAndHead), 4)
    with pytest.raises(ValueError, match=r"gamma is 4 and does not divide the 6 outputs of layer 'conv'"):
        bf.split_synapses(nn.ModuleDict({"conv": built(lambda: nn.Conv2d(4, 6, 1))}), 4, skip=None)


@pytest.mark.parametrize("gamma", [0, -2])
def test_gamma_below_one_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma is {gamma}; .*at least 1"):
        bf.split_synapses(built(mlp), gamma)


@pytest.mark.parametrize("gamma", [True, 2.5, 2.0, "2"])
def test_gamma_that_is_no_integer_is_refused(gamma):
    with pytest.raises(TypeError, match=f"gamma is {gamma!r}; .*integer"):
        bf.split_synapses(built(mlp), gamma)


@pytest.mark.parametrize("skip", ["haed", ["head.*", "haed"]])
def test_a_glob_that_matches_nothing_is_refused_with_the_names_of_the_layers(skip):
    with pytest.raises(ValueError, match=r"'haed'.*backbone\.0, backbone\.2, head\.1\.0"):
        bf.split_synapses(built(BackboneAndHead), skip=skip)


@pytest.mark.parametrize("gamma", [1, 2])
def test_a_split_model_is_not_split_again(gamma):
    split = bf.split_synapses(built(mlp))
    with pytest.raises(ValueError, match="layer '0' is split already"):
        bf.split_synapses(split, gamma)


@pytest.mark.parametrize(
    ("make", "skip"),
    [(lambda: nn.Linear(4, 4), "last"), (nn.ReLU, "last"), (nn.ReLU, None), (mlp, "*")],
    ids=["one layer", "no layer", "no layer, skip=None", "all skipped"],
)
def test_a_model_without_a_layer_to_split_is_refused(make, skip):
    with pytest.raises(ValueError, match="no layer is left to split"):
        bf.split_synapses(built(make), skip=skip)


def test_an_attentions_projection_is_refused_by_name_unless_skipped():
    model = built(lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 4)}))
    for skip in ("last", None, "head"):
        with pytest.raises(TypeError, match=r"'attention\.out_proj'.*skip=\['\*out_proj'"):
            bf.split_synapses(model, skip=skip)
    assert hooked(bf.split_synapses(model, skip=["*out_proj"])) == ["head"]


# --- transformers: fused inference paths must not bypass the split ---


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True)


def test_a_transformer_layer_is_split_in_eval_mode_as_in_train_mode():
    model, x = built(encoder_layer), normal(2, 5, 8)
    split = bf.split_synapses(model, 2, skip=["*out_proj"])
    assert hooked(split) == ["linear1", "linear2"]
    with torch.no_grad():
        trained, evaluated, unsplit = split.train()(x), split.eval()(x), model.eval()(x)
    same(evaluated, trained, 1e-12)
    assert (evaluated - unsplit).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_transformer_with_padding_is_split_in_eval_mode_as_in_train_mode():
    model = built(lambda: nn.TransformerEncoder(encoder_layer(), 2))
    split = bf.split_synapses(model, 2, skip=["*out_proj"])
    x, padding = normal(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        trained = split.train()(x, src_key_padding_mask=padding)
        evaluated = split.eval()(x, src_key_padding_mask=padding)
    same(evaluated[~padding], trained[~padding], 1e-12)


# --- what a module must survive ---


def test_a_deep_copy_is_split_and_independent():
    split, x = bf.split_synapses(built(mlp), 2, activation=torch.tanh), normal(3, 6)
    outputs = split(x)
    twin = copy.deepcopy(split)
    assert torch.equal(twin(x), outputs)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert torch.equal(split(x), outputs)
    assert not torch.equal(twin(x), outputs)


@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["identity", "tanh"])
def test_a_pickle_round_trip_keeps_the_split(activation):
    split, x = bf.split_synapses(built(mlp), 2, activation=activation), normal(3, 6)
    again = pickle.loads(pickle.dumps(split))
    assert hooked(again) == hooked(split) == ["0", "2"]
    assert torch.equal(again(x), split(x))


def test_vmap_over_stacked_parameters_is_the_loop():
    split, x = bf.split_synapses(built(mlp), 2, activation=torch.tanh), normal(3, 6)
    members = [dict(built(mlp, seed).named_parameters()) for seed in range(4)]

    def run(params):
        return functional_call(split, params, (x,))

    together = torch.vmap(run)(bf.ensemble.stack(members))
    same(together, torch.stack([run(member) for member in members]))


def test_vmap_over_inputs_is_the_batch():
    split = bf.split_synapses(built(lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(-3), nn.Linear(16, 3))))
    x = normal(5, 2, 3, 3)
    same(torch.vmap(split)(x), split(x))


@pytest.mark.parametrize("activation", [None, torch.tanh], ids=["identity", "tanh"])
def test_compiled_is_eager(activation):
    split, params = bf.split_synapses(built(mlp), 2, activation=activation), dict(built(mlp, 1).named_parameters())

    def loss(params, x):
        return functional_call(split, params, (x,)).square().sum()

    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
    x = normal(3, 6)
    for name, expected in grad(loss)(params, x).items():
        same(compiled(params, x)[name], expected)


def test_compiled_convolutions_are_eager():
    split = bf.split_synapses(built(lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(-3), nn.Linear(16, 3))))
    x = normal(5, 2, 3, 3)
    same(torch.compile(split, backend="aot_eager", fullgraph=True)(x), split(x))


# --- what the split is worth ---


@pytest.mark.parametrize("gamma", [2, 4])
def test_a_linear_split_under_sgd_is_a_narrower_net_that_learns_faster(gamma):
    """SCIENCE.md 1.6, 1: group-summed weights; lr gamma on the first and last layer, gamma^2 between them.

    A bias has no inputs to share: its factor is gamma in a split layer and 1 in the last.
    """
    sizes, lr = (5, 8, 12, 3), 0.002
    model = built(lambda: mlp(sizes))
    split, narrow = bf.split_synapses(model, gamma), built(lambda: mlp((5, 8 // gamma, 12 // gamma, 3)))
    factor = {"0": gamma, "2": gamma**2, "4": gamma}

    def narrowed(params):
        sums = dict(params)
        for layer in ("0", "2"):
            for name in (f"{layer}.weight", f"{layer}.bias"):
                sums[name] = sums[name].unflatten(0, (-1, gamma)).sum(1)
        for layer in ("2", "4"):
            sums[f"{layer}.weight"] = sums[f"{layer}.weight"].unflatten(1, (-1, gamma)).sum(2)
        return sums

    def loss(params, net, x, target):
        return (functional_call(net, params, (x,)) - target).square().mean()

    params = {name: p.detach() for name, p in model.named_parameters()}
    few = narrowed(params)
    start = few
    x, target = normal(16, 5), normal(16, 3, seed=1)
    learn = bf.chain(bf.descend(lr))
    state = learn.init(params, bf.random.key(0))
    for _ in range(20):
        params, _, state = learn(params, grad(loss)(params, split, x, target), state)
        slope = grad(loss)(few, narrow, x, target)
        rates = {name: factor[name[0]] if "weight" in name else {"4": 1}.get(name[0], gamma) for name in few}
        few = {name: w - lr * rates[name] * slope[name] for name, w in few.items()}
    for name, w in narrowed(params).items():
        same(w, few[name], 1e-10)
        assert (few[name] - start[name]).abs().max() > 1e-4
    same(functional_call(split, params, (x,)), functional_call(narrow, few, (x,)), 1e-10)


def test_a_compiled_step_tells_split_models_apart():
    """One step function, one shape, other contacts: the compiler must not run a model with the code of another."""
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    models = [
        plain,
        *[bf.split_synapses(plain, g, activation=phi) for g, phi in ((2, None), (4, None), (2, torch.tanh))],
    ]
    params = {name: normal(3, *p.shape) for name, p in plain.named_parameters()}
    x = normal(5, 6)

    def train(model, compiled):
        def loss(params, x):
            return functional_call(model, params, (x,)).square().mean()

        def step(params, x):
            return torch.func.grad(loss)(params, x)

        ensemble_step = torch.vmap(step, in_dims=(0, None))
        if compiled:
            ensemble_step = torch.compile(ensemble_step, backend="aot_eager", fullgraph=True)
        return ensemble_step(params, x)["0.weight"]

    torch._dynamo.reset()
    compiled = [train(model, True) for model in models]
    for result, model in zip(compiled, models, strict=True):
        assert torch.allclose(result, train(model, False))
    for other in compiled[1:]:
        assert not torch.allclose(compiled[0], other)


def test_a_split_layer_says_so():
    assert "SplitLinear(in_features=6" in repr(bf.split_synapses(built(mlp), 2))
    assert "gamma=2" in repr(bf.split_synapses(built(mlp), 2))
