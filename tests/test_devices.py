"""What another device asks of the rules, shown without one: fake tensors have a device, a shape and no values.

In a fake step nothing can be read on the host, and a tensor of the CPU that meets one of the device raises. What real
devices would allow and pay with a wait of the host, a copy between the two, is counted.
"""

from functools import partial

import pytest
import torch
from helpers import leaves, make_state, mlp
from table import CASES, IDS, TABLE
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import biofunc as bf
from biofunc import keys, philox

every_case = pytest.mark.parametrize(("row", "settings"), CASES, ids=IDS)
DEVICE = torch.device("cuda", 0)


COPYING = ("aten._to_copy.default", "aten.copy_.default", "aten.where.self")


class Crossings(TorchDispatchMode):
    """Lists the operations that copy from one device to another or read a value, even if the caller catches the error.

    0-d tensors of the CPU are numbers to an operation of the device, except to torch.where, which copies them.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) == "aten._local_scalar_dense.default" and args[0].device.type != "cpu":
            self.seen.append(str(function))
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        copies = str(function) in COPYING or any(tensor.dim() for tensor in tensors if tensor.device.type == "cpu")
        if copies and len({tensor.device for tensor in tensors}) > 1:
            self.seen.append(str(function))
        return result


class Unguarded(TorchFunctionMode):
    """Some of Python's ways to an operation by another way: torch built without CUDA refuses them on its devices."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.as_tensor:
            given = args[0] if isinstance(args[0], torch.Tensor) else torch.tensor(args[0])
            return given.to(kwargs.get("device", given.device), kwargs.get("dtype", given.dtype))
        if function is torch.Tensor.__invert__:
            return args[0].bitwise_not()
        if function in (torch.nn.init.kaiming_uniform_, torch.nn.init.uniform_):
            return kwargs.get("tensor", *args[:1]).detach().zero_()
        if function is not torch.Tensor.__getitem__:
            return function(*args, **kwargs)
        tensor, index = args
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, torch.Tensor) for i in index):
            return torch.ops.aten.index.Tensor(tensor, list(index))
        axis, given = 0, sum(i is not None and i is not Ellipsis for i in index)
        for i in index:
            if i is Ellipsis:
                axis += args[0].dim() - given
            elif i is None:
                tensor, axis = tensor.unsqueeze(axis), axis + 1
            elif isinstance(i, slice):
                stop = tensor.shape[axis] if i.stop is None else i.stop
                tensor, axis = torch.ops.aten.slice.Tensor(tensor, axis, i.start or 0, stop, i.step or 1), axis + 1
            else:
                tensor = tensor.select(axis, i)
        return tensor


@pytest.fixture
def elsewhere(monkeypatch):
    """Everything inside is fake; what the library keeps per device is kept as on a real one, and forgotten after."""
    monkeypatch.setattr(philox, "_NORMAL_TABLES", dict(philox._NORMAL_TABLES))
    monkeypatch.setattr(keys, "_WORDS", {})
    monkeypatch.setattr(philox, "outlives_this_call", lambda tensor: True)
    # The table of normals is made at import, before any mode: the only tensor that is not fake
    with FakeTensorMode(allow_non_fake_inputs=True), Unguarded(), Crossings() as crossings:
        yield crossings


def trees_there(dtype=torch.float32):
    return [{path: torch.empty(w.shape, dtype=dtype, device=DEVICE) for path, w in tree.items()} for tree in SHAPES]


SHAPES = mlp()


def devices(tree):
    return {leaf.device for leaf in leaves(tree).values()}


def assert_steps_stay_there(learn, params, grads, state, crossings, **signals):
    """The second step copies nothing: the first may fill what is kept per device."""
    device = devices(params)
    assert devices(state) == device
    for _ in range(2):
        crossings.seen.clear()
        params, new_grads, state = learn(params, grads, state, **signals)
        assert devices((params, new_grads, state)) == device
    assert crossings.seen == []


@every_case
def test_a_rule_stays_on_the_device_of_its_leaves(elsewhere, row, settings):
    params, grads = trees_there(torch.bfloat16)
    rule = row.make(**settings)
    assert_steps_stay_there(rule, params, grads, make_state(rule, params), elsewhere)


@every_case
def test_an_ensemble_stays_on_the_device_of_its_leaves(elsewhere, row, settings):
    params, grads = [{path: w.expand(3, *w.shape).clone() for path, w in tree.items()} for tree in trees_there()]
    rule = row.make(**settings)
    state = torch.vmap(partial(make_state, rule))(params, bf.random.key(torch.arange(3), device=DEVICE))
    assert_steps_stay_there(torch.vmap(rule), params, grads, state, elsewhere)


SCHEDULES = {
    "constant": bf.schedules.constant(0.5),
    "linear": bf.schedules.linear(0.5, 0.1, 3),
    "cosine": bf.schedules.cosine(0.5, 0.1, 3),
    "exponential": bf.schedules.exponential(0.5, 0.9, 3),
    "piecewise": bf.schedules.piecewise(0.5, {2: 0.25}),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_read_nothing_on_the_host(elsewhere, schedule):
    params, grads = trees_there()
    rule = bf.descend(schedule)
    assert_steps_stay_there(rule, params, grads, make_state(rule, params), elsewhere)


@pytest.mark.parametrize("row", [row for row in TABLE.values() if row.at_step], ids=lambda row: row.given)
def test_tensor_hyperparameters_may_live_there_or_on_the_cpu(elsewhere, row):
    """A 0-d tensor of the CPU is a number to an operation of the device; none is copied to and fro."""
    params, grads = trees_there()
    for device in ("cpu", DEVICE):
        rule = row.make(**{name: torch.full((), 0.5, device=device) for name in row.at_step})
        _, _, state = rule(params, grads, make_state(rule, params))
        elsewhere.seen.clear()
        assert devices(rule(params, grads, state)) == {DEVICE}
        assert elsewhere.seen == []


WHOLE = (
    bf.crystallize,
    bf.temporal_learning_rates,
    bf.activity_dependent_rates,
    bf.adam(),
    bf.volume_dependent_lr,
    partial(bf.fuzzy_learning_rates, nu=0.16),
    bf.descend(bf.schedules.cosine(0.1, 0.0, 100)),
    bf.every(2, bf.rejuvenate_weights),
    bf.every(3, bf.rejuvenate_weights_lognormal),
    bf.where("fc1*", bf.synaptic_scaling),
    bf.enforce_dales_principle,
)


def test_a_chain_of_all_stays_there(elsewhere):
    params, grads = trees_there()
    learn = bf.chain(*WHOLE)
    activity = {path: torch.empty(w.shape[0], device=DEVICE) for path, w in params.items() if w.dim() > 1}
    assert_steps_stay_there(learn, params, grads, learn.init(params, bf.random.key(0)), elsewhere, activity=activity)


@pytest.mark.parametrize("distribution", sorted(bf.distributions.NAMED))
def test_rates_of_every_distribution_are_drawn_there(elsewhere, distribution):
    params, _ = trees_there()
    rule = partial(bf.fuzzy_learning_rates, distribution=distribution)
    assert devices(bf.init(params, bf.random.key(0), rule)) == {DEVICE}


@pytest.mark.parametrize("settings", [{"apply_dales_principle": True}, {"weight_splitting_Gamma": 2}], ids=str)
def test_a_converted_module_learns_there(settings):
    """On the meta device: a module of fake tensors cannot be copied."""
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        x = torch.empty(5, 6)
    bio = bf.convert(model, **settings)

    def loss(params, buffers):
        y, buffers = bio.apply_and_update(params, buffers, x)
        return y.sum(), buffers

    grads, buffers = torch.func.grad(loss, has_aux=True)(bio.params, bio.buffers)
    assert devices((bio.params, bio.buffers, buffers)) == {x.device}
    with Crossings() as crossings:
        assert_steps_stay_there(bio.learn, bio.params, grads, bio.state, crossings)


def test_recorded_activity_is_there():
    with torch.device("meta"):
        model, x = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)), torch.empty(5, 6)
    assert devices(bf.record_activity(model)(dict(model.named_parameters()), {}, x)) == {x.device}


def test_a_periodic_rule_is_selected_where_reading_the_step_would_wait(elsewhere):
    params, grads = trees_there()
    learn = bf.chain(bf.descend(0.1), bf.every(1000, bf.rejuvenate_weights))
    state = learn.init(params, bf.random.key(0))
    assert_steps_stay_there(learn, params, grads, state, elsewhere)


DRAWS = {
    **{
        f"uniform, {dtype}": partial(bf.random.uniform, shape=(5, 3), dtype=dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    },
    "normal": partial(bf.random.normal, shape=(5, 3)),
    "bernoulli": partial(bf.random.bernoulli, p=0.3, shape=(5, 3)),
    "rademacher": partial(bf.random.rademacher, shape=(5, 3)),
    "gamma": lambda key: bf.random.gamma(key, 0.5, (5, 3)),
    "beta": lambda key: bf.random.beta(key, 0.5, 2.0, (5, 3)),
    "split": partial(bf.random.split, num=3),
    "fold_in an integer": lambda key: bf.random.fold_in(key, 5),
    "fold_in a name": lambda key: bf.random.fold_in(key, "name"),
    "fold_in a tensor": lambda key: bf.random.fold_in(key, key[1]),
    "fold_in many names": lambda key: keys.fold_in_names(key, ("a", "b")),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_are_where_the_key_is(elsewhere, draw):
    key = bf.random.key(0, device=DEVICE)
    assert draw(key).device == key.device
    elsewhere.seen.clear()
    draw(key)
    assert elsewhere.seen == []


def test_stacks_stay_there(elsewhere):
    params, _ = bf.ensemble.init(lambda: torch.nn.Linear(6, 4, device=DEVICE), seeds=range(3))
    assert devices(params) == {DEVICE}
    assert devices(bf.ensemble.stack(bf.ensemble.unstack(params))) == {DEVICE}


def test_the_law_can_fail(elsewhere):
    """Each way in which a rule could leave its device or ask it for a value is noticed."""
    params, grads = trees_there()

    def broken(transform):
        @bf.rule(phase="weights")
        def rule(params, grads, state):
            return {path: transform(w) for path, w in params.items()}, grads, state

        assert_steps_stay_there(rule, params, grads, bf.init(params, bf.random.key(0), rule), elsewhere)

    with pytest.raises(AssertionError):
        broken(lambda w: w.cpu())
    with pytest.raises(AssertionError):
        broken(lambda w: w * torch.tensor(0.5, device=w.device))
    with pytest.raises(RuntimeError, match=r"cuda.*cpu"):
        broken(lambda w: w * torch.ones(w.shape))
    with pytest.raises(DataDependentOutputException):
        broken(lambda w: w * w.sum().item())
    with pytest.raises(DataDependentOutputException):
        broken(lambda w: w if w.sum() > 0 else -w)
    with pytest.raises(RuntimeError):  # its shape would hang on values
        broken(lambda w: w + w[w > 0].sum())


def test_words_of_names_are_kept_unless_they_die_with_this_call():
    assert philox.outlives_this_call(torch.ones(1))
    with FakeTensorMode():
        assert not philox.outlives_this_call(torch.ones(1))
    torch.func.grad(lambda x: (_is_kept(x), x)[1])(torch.ones(()))


def _is_kept(x):
    assert not philox.outlives_this_call(x)
