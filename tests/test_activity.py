"""Recorded activity: against an explicit forward pass, and what a recorder must survive."""

import copy
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

import biofunc as bf
from biofunc.activity import record_activity
from biofunc.scaling import synaptic_scaling


def built(make, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)


def normal(*shape, seed=0):
    return bf.random.normal(bf.random.key(seed), shape, dtype=torch.float64)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))


def parts(model):
    return dict(model.named_parameters()), dict(model.named_buffers())


def run(model, x, **keywords):
    return record_activity(model, **keywords)(*parts(model), x)


def same(a, b, tolerance=1e-13):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def mean_of_relu(y, dim):
    """Per neuron, one number at a time."""
    rows = y.movedim(dim, 0).flatten(1).tolist()
    return torch.tensor([sum(max(v, 0.0) for v in row) / len(row) for row in rows], dtype=torch.float64)


# --- the formula ---


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)], ids=lambda shape: f"rank{len(shape)}")
def test_activity_of_an_mlp_is_that_of_an_explicit_forward_pass(shape):
    model, x = built(mlp), normal(*shape)
    y, activity = run(model, x)
    assert list(activity) == ["0.weight", "2.weight", "4.weight"]
    assert torch.equal(y, model(x))
    h = x
    for i, layer in enumerate(model):
        h = layer(h)
        if i % 2 == 0:
            a = activity[f"{i}.weight"]
            assert a.shape == (layer.out_features,)
            same(a, mean_of_relu(h, -1))


def test_one_vector_is_its_own_mean():
    model, x = built(lambda: nn.Linear(6, 4)), normal(6)
    assert torch.equal(run(model, x)[1]["weight"], model(x).relu())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_a_neuron_of_a_convolution_is_an_output_channel(dims, batched):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = built(lambda: nn.Sequential(conv(2, 4, 3, groups=2)))
    x = normal(*([3] if batched else []), 2, *[5, 6, 4][:dims])
    y, activity = run(model, x)
    assert activity["0.weight"].shape == (4,)
    same(activity["0.weight"], mean_of_relu(y, 1 if batched else 0))


@pytest.mark.parametrize(
    "measure", [torch.abs, torch.square, nn.Softplus(), lambda y: (y > 0).to(y.dtype), lambda y: y]
)
def test_any_elementwise_measure(measure):
    model, x = built(lambda: nn.Linear(6, 4)), normal(7, 6)
    y, activity = run(model, x, measure=measure)
    same(activity["weight"], measure(y).mean(0))


class Reused(nn.Module):
    """One layer three times, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.inner, self.idle = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x, times=3):
        for _ in range(times):
            x = torch.tanh(self.inner(x))
        return x


def test_a_layer_used_several_times_has_the_mean_over_its_uses():
    model, x = built(Reused), normal(4, 5)
    _, activity = run(model, x)
    outputs = []
    for _ in range(3):
        outputs.append(model.inner(x))
        x = torch.tanh(outputs[-1])
    same(activity["inner.weight"], torch.stack(outputs).relu().mean((0, 1)))


def test_a_layer_that_is_not_called_is_missing_and_keywords_reach_the_model():
    model, x = built(Reused), normal(4, 5)
    record = record_activity(model)
    y, activity = record(*parts(model), x, times=1)
    assert list(activity) == ["inner.weight"]
    assert torch.equal(y, model(x, times=1))
    assert record(*parts(model), x, times=0)[1] == {}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.embed, self.head = [
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.Embedding(7, 4),
            nn.Linear(4, 7),
        ]
        self.second.weight = self.first.weight
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embed(tokens))))))


def test_tied_weights_have_their_first_name():
    model, tokens = built(Tied), torch.arange(6).reshape(2, 3)
    y, activity = run(model, tokens)
    assert list(activity) == ["first.weight", "embed.weight"]
    assert set(activity) <= set(dict(model.named_parameters()))
    first = model.first(model.embed(tokens))
    second = model.second(torch.tanh(first))
    same(activity["first.weight"], torch.stack([first, second]).relu().flatten(0, -2).mean(0))
    same(activity["embed.weight"], y.relu().flatten(0, -2).mean(0))


@pytest.mark.parametrize("activation", [None, torch.tanh])
def test_a_split_model_is_recorded_after_the_sum(activation):
    model, x = built(mlp), normal(5, 6)
    split = bf.split_synapses(model, 2, activation=activation)
    y, activity = run(split, x)
    assert torch.equal(y, split(x))
    h = split[0](x)
    assert torch.equal(h[:, 0], h[:, 1])
    same(activity["0.weight"], h.relu().mean(0))
    same(activity["4.weight"], y.relu().mean(0))


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_is_recorded_in_training_and_in_eval(training):
    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    model, x = built(make).train(training), normal(3, 5, 8)
    y, activity = run(model, x)
    same(y, model(x), 1e-12)
    assert list(activity) == [f"layers.{i}.linear{j}.weight" for i in range(2) for j in (1, 2)]
    with torch.no_grad():  # eval mode has a fast path that calls no layer
        assert list(run(model, x)[1]) == list(activity)
        mask = torch.zeros(3, 5, dtype=torch.bool)
        mask[1, 3:] = True  # with padding it takes nested tensors, which warn and which hooked layers cannot take
        y, activity = record_activity(model)(*parts(model), x, src_key_padding_mask=mask)
        model.use_nested_tensor = False
        same(y[~mask], model(x, src_key_padding_mask=mask)[~mask], 1e-12)
        assert list(activity) == [f"layers.{i}.linear{j}.weight" for i in range(2) for j in (1, 2)]


# --- purity ---


def test_the_model_stays_as_it_is():
    model = built(mlp)
    before = copy.deepcopy(model.state_dict())
    run(model, normal(5, 6))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], leaf) for name, leaf in model.state_dict().items())


def test_parameters_come_from_the_call_not_from_the_copy():
    model, other, x = built(mlp), built(mlp, seed=1), normal(5, 6)
    record = record_activity(model)
    y, activity = record(*parts(other), x)
    assert torch.equal(y, other(x))
    same(activity["0.weight"], other[0](x).relu().mean(0))


def test_batch_statistics_reach_the_buffers_given_and_never_the_copy():
    model, x = built(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))), normal(5, 6)
    record = record_activity(model)
    before = copy.deepcopy(record.model.state_dict())
    record(dict(model.named_parameters()), {}, x)
    buffers = {name: leaf.clone() for name, leaf in model.named_buffers()}
    record(dict(model.named_parameters()), buffers, x)
    assert all(torch.equal(before[name], leaf) for name, leaf in record.model.state_dict().items())
    expected = copy.deepcopy(model)
    expected(x)
    assert all(torch.equal(leaf, buffers[name]) for name, leaf in expected.named_buffers())


class Fussy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, fail=False):
        x = self.inner(x)
        if fail:
            raise RuntimeError("stopped half-way")
        return x


def test_nothing_leaks_from_one_call_to_the_next():
    model = built(Fussy)
    record = record_activity(model)
    first = record(*parts(model), normal(4, 3))[1]
    second = record(*parts(model), 2 * normal(4, 3, seed=1))[1]
    with pytest.raises(RuntimeError, match="half-way"):
        record(*parts(model), 100 * normal(4, 3), fail=True)
    assert record.tape.uses is None
    assert torch.equal(record(*parts(model), normal(4, 3))[1]["inner.weight"], first["inner.weight"])
    assert not torch.equal(first["inner.weight"], second["inner.weight"])
    record.model(normal(4, 3))  # outside of a call, nothing is recorded
    assert record.tape.uses is None


def test_recomputation_in_the_backward_pass_records_nothing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model, x = built(Checkpointed), normal(4, 3)
    record = record_activity(model)
    y, activity = record(*parts(model), x)
    before = activity["inner.weight"].clone()
    y.sum().backward()
    assert record.tape.uses is None
    assert torch.equal(activity["inner.weight"], before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_recorder_can_be_copied_and_pickled(duplicate):
    model, x = built(mlp), normal(5, 6)
    record = record_activity(bf.split_synapses(model, 2))
    twin = duplicate(record)
    assert twin.tape is not record.tape
    y, activity = twin(*parts(model), x)
    expected_y, expected = record(*parts(model), x)
    assert torch.equal(y, expected_y)
    assert list(activity) == list(expected)
    assert all(torch.equal(activity[path], expected[path]) for path in expected)
    assert record.tape.uses is None


# --- transforms ---


def loss_of(record, buffers):
    def loss(params, x):
        y, activity = record(params, buffers, x)
        return y.square().mean(), activity

    return loss


def test_grad_with_aux_gives_the_gradient_of_the_plain_model_and_the_activity():
    model, x = built(mlp), normal(5, 6)
    params, buffers = parts(model)
    grads, activity = grad(loss_of(record_activity(model), buffers), has_aux=True)(params, x)
    plain = grad(lambda p: functional_call(model, p, (x,)).square().mean())(params)
    assert all(torch.equal(grads[path], plain[path]) for path in params)
    expected = run(model, x)[1]
    assert all(torch.equal(activity[path], expected[path]) for path in expected)
    assert not any(a.requires_grad for a in activity.values())


def test_no_gradient_flows_through_activity():
    model, x = built(mlp), normal(5, 6)
    record = record_activity(model, measure=nn.PReLU().double())  # not even to the parameters of measure
    params, buffers = parts(model)

    def total(p):
        return sum(a.sum() for a in record(p, buffers, x)[1].values())

    assert not any(g.any() for g in grad(total)(params).values())
    hessian_like = grad(lambda p: sum(g.sum() for g in grad(total)(p).values()))(params)
    assert not any(g.any() for g in hessian_like.values())
    assert not any(a.requires_grad for a in record(params, buffers, x)[1].values())  # parameters of a module, backward


def test_vmap_over_an_ensemble_equals_the_loop():
    models, x = [built(mlp, seed) for seed in range(3)], normal(5, 6)
    record = record_activity(models[0])
    singles = [{name: leaf.detach() for name, leaf in model.named_parameters()} for model in models]
    step = grad(loss_of(record, {}), has_aux=True)
    together = torch.vmap(step, in_dims=(0, None))(bf.ensemble.stack(singles), x)
    for left, params in zip(bf.ensemble.unstack(together), singles, strict=True):
        for a, b in zip(left, step(params, x), strict=True):
            for path in b:
                same(a[path], b[path], 1e-12)


def test_per_example_activity_with_vmap_over_the_batch():
    model, x = built(mlp), normal(5, 6)
    params, _ = parts(model)
    _, activity = torch.vmap(record_activity(model), in_dims=(None, None, 0))(params, {}, x)
    same(activity["0.weight"], model[0](x).relu())


@pytest.mark.parametrize("members", [None, 2])
def test_compiled_equals_eager_and_compiles_once(members):
    torch._dynamo.reset()
    model = built(lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(-2), mlp()))
    model[3] = built(lambda: nn.Linear(16, 4))
    step = grad(loss_of(record_activity(bf.split_synapses(model, 2)), {}), has_aux=True)
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    if members:
        params, step = bf.ensemble.stack([params] * members), torch.vmap(step, in_dims=(0, None))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(3):
        x = normal(5, 2, 6, seed=seed)
        for left, right in zip(compiled(params, x), step(params, x), strict=True):
            assert list(left) == list(right)
            for path in right:
                same(left[path], right[path], 1e-12)
    assert counter.frame_count == 1


def test_compiled_and_eager_calls_may_alternate():
    torch._dynamo.reset()
    model, x = built(mlp), normal(5, 6)
    record = record_activity(model)
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    compiled = torch.compile(record, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        a, b = compiled(params, {}, x)[1], record(params, {}, x)[1]
        assert all(torch.equal(a[path], b[path]) for path in b)
        assert record.tape.uses is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_activity_is_float32_at_least(dtype):
    model, x = built(mlp, dtype=dtype), normal(5, 6).to(dtype)
    y, activity = run(model, x)
    assert y.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {a.dtype for a in activity.values()} == {wide}
    assert torch.equal(activity["0.weight"], model[0](x).to(wide).relu().mean(0))


def test_autocast():
    model, x = built(mlp, dtype=torch.float32), normal(5, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, activity = run(model, x)
        plain = model[0](x)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert {a.dtype for a in activity.values()} == {torch.float32}
    assert torch.equal(activity["0.weight"], plain.float().relu().mean(0))


# --- together with a rule, and errors ---


def test_recorded_paths_are_those_that_synaptic_scaling_asks_for():
    model, x = built(mlp, dtype=torch.float32), normal(5, 6).float()
    learn = bf.chain(bf.descend(0.1), synaptic_scaling)
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    state = learn.init(params, bf.random.key(0))
    grads, activity = grad(loss_of(record_activity(model), {}), has_aux=True)(params, x)
    _, _, state = learn(params, grads, state, activity=activity)
    assert all(torch.equal(state.activity[path], activity[path]) for path in activity)


def test_frozen_layers_are_recorded():
    model = built(mlp).requires_grad_(False)
    assert list(run(model, normal(5, 6))[1]) == ["0.weight", "2.weight", "4.weight"]


def test_a_layer_whose_weight_is_computed_has_no_parameter_to_name():
    model = built(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3)))
    y, activity = run(model, normal(5, 6))
    same(y, model(normal(5, 6)))
    assert list(activity) == ["1.weight"]


def test_repr_names_model_and_paths():
    assert repr(record_activity(built(mlp))) == "record_activity(Sequential: 0.weight, 2.weight, 4.weight)"


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "model is function", lambda: record_activity(mlp)),
        (TypeError, "measure is .*ReLU", lambda: record_activity(nn.Linear(2, 2), measure=nn.ReLU)),
        (TypeError, "measure is None", lambda: record_activity(nn.Linear(2, 2), measure=None)),
        (ValueError, "no Linear or Conv layer", lambda: record_activity(nn.ReLU())),
        (
            ValueError,
            r"measure gives \(\).*\(5, 6\).*'weight'",
            lambda: run(nn.Linear(6, 6).double(), normal(5, 6), measure=torch.mean),
        ),
    ],
)
def test_errors_name_what_is_wrong(error, message, make):
    with torch.random.fork_rng(devices=[]), pytest.raises(error, match=message):
        make()


def test_a_compiled_step_tells_recorders_apart():
    """The compiler must not run one recorder with the measure that it compiled for another."""
    with torch.random.fork_rng():
        model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    x, params = torch.linspace(-1, 1, 15).reshape(5, 3), dict(model.named_parameters())

    def make(record):
        def step(params, x):
            return record(params, {}, x)

        return step

    torch._dynamo.reset()
    for measure in (torch.relu, torch.abs, torch.tanh):
        record = record_activity(model, measure=measure)
        compiled = torch.compile(make(record), backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(params, x)[1]["0.weight"], measure(model(x)).mean(0))
