"""Optimizers and descend: torch.optim is the oracle; a re-drawn synapse starts as a new one."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import schedules

STEPS = 100


def mlp():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def normal(*shape, seed=0, dtype=torch.float64):
    return bf.random.normal(bf.random.key(seed), shape, dtype=dtype)


def params_of(dtype=torch.float64):
    return {"w": normal(4, 3, seed=1, dtype=dtype), "v": normal(2, 4, seed=2, dtype=dtype), "b": normal(4, dtype=dtype)}


def gradients(step, params):
    """Gradients that do not depend on the parameters: a change of one synapse changes no other gradient."""
    return {
        path: normal(*leaf.shape, seed=10 * step + 10 + i, dtype=leaf.dtype)
        for i, (path, leaf) in enumerate(params.items())
    }


def run(learn, params, state, steps, start=0):
    for step in range(start, start + steps):
        params, directions, state = learn(params, gradients(step, params), state)
    return params, directions, state


# --- against torch.optim ---

X, TARGET = normal(12, 4), normal(12, 3, seed=1)


def trained_by(optimizer_of):
    """Parameters after torch.optim has trained the MLP on fixed data."""
    model = mlp()
    optimizer = optimizer_of(model.parameters())
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(X) - TARGET).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def trained_with(rule, lr):
    model = mlp()

    def loss(params):
        return (functional_call(model, params, (X,)) - TARGET).square().mean()

    params = {name: p.detach() for name, p in model.named_parameters()}
    learn = bf.chain(rule, bf.descend(lr))
    state = learn.init(params, bf.random.key(0))
    for _ in range(STEPS):
        params, _, state = learn(params, grad(loss)(params), state)
    return params


def assert_same_training(rule, lr, optimizer_of):
    """Every leaf, biases too, ends where torch.optim takes it, and had to move to get there."""
    expected, start = trained_by(optimizer_of), dict(mlp().named_parameters())
    for name, leaf in trained_with(rule, lr).items():
        torch.testing.assert_close(leaf, expected[name], rtol=0, atol=1e-12)
        assert (leaf - start[name]).abs().min() > 1e-6


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
def test_sgd_is_that_of_torch(momentum, nesterov, weight_decay):
    keywords = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    assert_same_training(bf.sgd(**keywords), 0.05, partial(torch.optim.SGD, lr=0.05, **keywords))


def test_descend_alone_is_sgd_without_momentum():
    rule = bf.sgd(momentum=0.0)
    bare = bf.chain(bf.descend(0.1))
    params = params_of()
    with_rule = bf.chain(rule, bf.descend(0.1))
    left = run(bare, params, bare.init(params, bf.random.key(0)), 10)[0]
    right = run(with_rule, params, with_rule.init(params, bf.random.key(0)), 10)[0]
    for path in params:
        assert torch.equal(left[path], right[path])


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.5, 0.99), 1e-3), ((0.0, 0.99), 1e-8)])
@pytest.mark.parametrize(("rule_of", "torch_optimizer"), [(bf.adam, torch.optim.Adam), (bf.adamw, torch.optim.AdamW)])
def test_adam_and_adamw_are_those_of_torch(rule_of, torch_optimizer, betas, eps, weight_decay):
    rule = rule_of(beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    optimizer_of = partial(torch_optimizer, lr=0.01, betas=betas, eps=eps, weight_decay=weight_decay)
    assert_same_training(rule, 0.01, optimizer_of)


@pytest.mark.parametrize(
    ("rule", "torch_optimizer"),
    [(bf.sgd(), torch.optim.SGD), (bf.adam(), torch.optim.Adam), (bf.adamw(), torch.optim.AdamW)],
)
def test_defaults_are_those_of_torch(rule, torch_optimizer):
    assert_same_training(rule, 0.01, partial(torch_optimizer, lr=0.01))


def test_adam_counting_per_synapse_is_adam():
    """A re-drawing rule in the chain that never fires changes the count's shape, not the training."""
    optimizer_of = partial(torch.optim.Adam, lr=0.01)
    model = mlp()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params):
        return (functional_call(model, params, (X,)) - TARGET).square().mean()

    learn = bf.chain(bf.adam(), bf.descend(0.01), partial(bf.rejuvenate_weights, dre=math.inf))
    state = learn.init(params, bf.random.key(0))
    for _ in range(STEPS):
        params, _, state = learn(params, grad(loss)(params), state)
    assert state.slots["adam"]["count"]["0.weight"].shape == (5, 4)
    for name, expected in trained_by(optimizer_of).items():
        torch.testing.assert_close(params[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "keywords",
    [
        {"momentum": torch.tensor(0.9), "weight_decay": torch.tensor(0.05)},
        {"momentum": schedules.constant(0.9), "weight_decay": schedules.constant(0.05)},
    ],
    ids=["tensor", "schedule"],
)
def test_hyperparameters_of_sgd_may_be_tensors_or_schedules(keywords):
    params = params_of()
    results = []
    for given in ({"momentum": 0.9, "weight_decay": 0.05}, keywords):
        learn = bf.chain(bf.sgd(**given), bf.descend(0.1))
        results.append(run(learn, params, learn.init(params, bf.random.key(0)), 5)[0])
    for path in params:
        torch.testing.assert_close(results[1][path], results[0][path], rtol=1e-6, atol=1e-6)


def test_members_with_their_own_hyperparameters_train_as_each_would_alone():
    params = params_of()

    def train(beta1, lr):
        learn = bf.chain(bf.adam(beta1=beta1), bf.descend(lr))
        return run(learn, params, learn.init(params, bf.random.key(0)), 10)[0]

    betas, rates = torch.tensor([0.0, 0.5, 0.9]).double(), torch.tensor([0.1, 0.01, 0.001]).double()
    together = torch.vmap(train)(betas, rates)
    for i in range(3):
        alone = train(betas[i].item(), rates[i].item())
        for path in params:
            torch.testing.assert_close(together[path][i], alone[path], rtol=1e-12, atol=1e-12)


def adam_where_synapses_count(dtype, rows=slice(None)):
    """A step of Adam, as a function of its betas, on a leaf whose synapses were re-drawn at different times."""
    w, g, square = [normal(65, 64, seed=i, dtype=dtype) for i in range(3)]
    count = torch.arange(w.numel(), dtype=dtype).reshape(w.shape) % 3000
    params, grads = {"w": w[rows]}, {"w": g[rows]}
    state = bf.init(params, bf.random.key(0), bf.adam(), bf.rejuvenate_weights)
    state = state.with_slot("adam", count={"w": count[rows]}, square={"w": square[rows] ** 2})

    def step(beta1, beta2):
        return bf.adam(beta1=beta1, beta2=beta2)(params, grads, state)[1]["w"]

    return step


def test_members_whose_synapses_count_have_the_betas_of_their_own():
    step = adam_where_synapses_count(torch.float32)
    betas = [torch.tensor(values, dtype=torch.float64) for values in ([0.0, 0.5, 0.9], [0.0, 0.9, 0.999])]
    torch._dynamo.reset()
    for run_members in (torch.vmap(step), torch.compile(torch.vmap(step), fullgraph=True)):
        together = run_members(*betas)
        assert together.dtype == torch.float32
        for i in range(3):
            alone = step(*[values[i].float() for values in betas])
            # Some ten roundings: compiled code corrects in float64
            torch.testing.assert_close(together[i], alone, rtol=1e-6, atol=1e-6)


# --- what a re-drawn synapse remembers ---

MASKS = {
    "w": torch.tensor([[i == 1 or (i + j) % 3 == 0 for j in range(3)] for i in range(4)]),
    "v": torch.tensor([[j == 2 for j in range(4)] for _ in range(2)]),
}


@bf.rule(phase="weights", redraws=True)
def redraw(params, grads, state, *, active: bool = True):
    """Puts new weights where the masks say so."""
    redrawn = {path: MASKS[path] & active for path in params}
    new = {path: torch.where(redrawn[path], 0.125, w) for path, w in params.items()}
    return new, grads, state.restart(redrawn)


OPTIMIZERS = {
    "adam": bf.adam(weight_decay=0.01),
    "adamw": bf.adamw(weight_decay=0.01),
    "sgd": bf.sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def with_and_without_redrawing(name, steps, period=7):
    """The same run twice: the rule re-draws at step 7 in one of them."""
    params, results = params_of(), []
    for active in (True, False):
        rule = bf.every(period, partial(redraw, active=active))
        learn = bf.chain(OPTIMIZERS[name], bf.descend(0.1), rule)
        results.append(run(learn, params, learn.init(params, bf.random.key(0)), steps))
    return results


@each_optimizer
def test_moments_and_counts_are_fresh_at_redrawn_synapses_and_unchanged_elsewhere(name):
    (params, _, state), (kept_params, _, kept_state) = with_and_without_redrawing(name, 7)
    slot, kept = state.slots[name], kept_state.slots[name]
    assert set(slot) == ({"momentum"} if name == "sgd" else {"mean", "square", "count"})
    for path, mask in MASKS.items():
        assert (params[path][mask] == 0.125).all()
        assert torch.equal(params[path][~mask], kept_params[path][~mask])
        for entry in slot:
            assert slot[entry][path].shape == mask.shape
            assert (slot[entry][path][mask] == 0.0).all()
            assert (kept[entry][path][mask] != 0.0).all()
            assert torch.equal(slot[entry][path][~mask], kept[entry][path][~mask])
    for entry in slot:
        assert torch.equal(slot[entry]["b"], kept[entry]["b"])
    assert torch.equal(params["b"], kept_params["b"])


@each_optimizer
def test_runs_stay_equal_elsewhere_after_the_redrawing(name):
    (params, _, state), (kept_params, _, kept_state) = with_and_without_redrawing(name, 13)
    for path, mask in MASKS.items():
        assert torch.equal(params[path][~mask], kept_params[path][~mask])
        assert not torch.isclose(params[path][mask], kept_params[path][mask]).any()
        for entry, leaves in state.slots[name].items():
            assert torch.equal(leaves[path][~mask], kept_state.slots[name][entry][path][~mask])
    assert torch.equal(params["b"], kept_params["b"])


def test_the_next_adam_step_at_a_redrawn_synapse_has_the_size_of_a_first_step():
    params = params_of()
    learn = bf.chain(bf.adam(), bf.descend(0.1), bf.every(40, redraw))
    first = run(learn, params, learn.init(params, bf.random.key(0)), 1)[1]
    redrawn = run(learn, params, learn.init(params, bf.random.key(0)), 40)
    next_gradients = gradients(40, params)
    moved, directions, _ = learn(redrawn[0], next_gradients, redrawn[2])
    for path, mask in MASKS.items():
        torch.testing.assert_close(first[path].abs(), torch.ones_like(first[path]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(directions[path][mask], next_gradients[path][mask].sign(), rtol=1e-5, atol=1e-5)
        assert (directions[path][~mask].abs() < 0.9).all()
        torch.testing.assert_close(
            moved[path][mask], 0.125 - 0.1 * next_gradients[path][mask].sign(), rtol=1e-5, atol=1e-5
        )


@each_optimizer
def test_a_redrawn_synapse_trains_on_as_in_a_new_run(name):
    """From its re-drawing on, the synapse follows the course it would take if the run began there."""
    params = params_of()
    rule = bf.every(7, redraw)
    learn = bf.chain(OPTIMIZERS[name], bf.descend(0.1), rule)
    halfway, _, state = run(learn, params, learn.init(params, bf.random.key(0)), 7)
    later = run(learn, halfway, state, 5, start=7)[0]
    anew = run(learn, halfway, learn.init(halfway, bf.random.key(0)), 5, start=7)[0]
    for path, mask in MASKS.items():
        torch.testing.assert_close(later[path][mask], anew[path][mask], rtol=1e-13, atol=1e-13)
        assert not torch.isclose(later[path][~mask], anew[path][~mask]).any()


def test_members_restart_each_for_itself():
    params, active = params_of(), torch.tensor([True, False])

    def train(active):
        learn = bf.chain(bf.adam(), bf.descend(0.1), partial(redraw, active=active))
        return run(learn, params, learn.init(params, bf.random.key(0)), 4)[2].slots["adam"]["count"]

    counts = torch.vmap(train)(active)
    for path, mask in MASKS.items():
        assert torch.equal(counts[path][0], torch.where(mask, 0.0, 4.0).double())
        assert torch.equal(counts[path][1], torch.full_like(mask, 4, dtype=torch.float64))


def test_the_rate_of_a_redrawn_synapse_is_that_of_its_birth():
    params = params_of()
    crystallize = partial(bf.crystallize, crystal_thresh=1e9, dampening_factor=0.5)
    learn = bf.chain(crystallize, bf.sgd(), bf.fuzzy_learning_rates, bf.descend(0.01), bf.every(3, redraw))
    born = learn.init(params, bf.random.key(0))
    state = run(learn, params, born, 3)[2]
    for path, mask in MASKS.items():
        assert torch.equal(state.plasticity[path], torch.where(mask, born.plasticity[path], born.plasticity[path] / 8))


def test_a_rule_of_ones_own_declares_memory_that_restarts_at_its_fresh_value():
    @bf.rule(phase="direction", memory={"age": 5.0})
    def grow_old(params, grads, state, *, name):
        older = {path: state.slots[name]["age"][path] + 1 for path in params}
        return params, grads, state.with_slot(name, age=older)

    params = params_of()
    learn = bf.chain(grow_old, bf.descend(0.1), bf.every(3, redraw))
    ages = run(learn, params, learn.init(params, bf.random.key(0)), 4)[2].slots["grow_old"]["age"]
    assert set(ages) == {"w", "v"}
    for path, mask in MASKS.items():
        assert torch.equal(ages[path], torch.where(mask, 6.0, 9.0).double())


# --- the shape and dtype of what is kept ---


@pytest.mark.parametrize("rule", [bf.adam(), bf.adamw()], ids=["adam", "adamw"])
def test_the_count_is_one_number_when_no_rule_redraws(rule):
    params = params_of()
    learn = bf.chain(rule, bf.fuzzy_learning_rates, bf.descend(0.1))
    state = learn.init(params, bf.random.key(0))
    after = run(learn, params, state, 3)[2]
    for path in params:
        assert state.slots[rule.name]["count"][path].shape == ()
        assert state.slots[rule.name]["count"][path] == 0
        assert after.slots[rule.name]["count"][path].shape == ()
        assert after.slots[rule.name]["count"][path] == 3


def test_only_synapses_count_for_themselves_when_a_rule_redraws():
    params = params_of()
    learn = bf.chain(bf.adam(), bf.descend(0.1), bf.rejuvenate_weights)
    count = learn.init(params, bf.random.key(0), where="w").slots["adam"]["count"]
    assert {path: leaf.shape for path, leaf in count.items()} == {"w": (4, 3), "v": (), "b": ()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_optimizer
def test_half_precision_parameters_have_float32_moments(name, dtype):
    params = params_of(dtype)
    learn = bf.chain(OPTIMIZERS[name], bf.descend(0.1), bf.every(2, redraw))
    state = learn.init(params, bf.random.key(0))
    after = run(learn, params, state, 3)
    for made in (state, after[2]):
        for leaves in made.slots[name].values():
            assert {leaf.dtype for leaf in leaves.values()} == {torch.float32}
    assert {leaf.dtype for leaf in (*after[0].values(), *after[1].values())} == {dtype}


def test_half_precision_gradients_are_averaged_in_float32():
    """0.001 g^2 is lost next to v in bfloat16 long before its average has converged."""
    params = {"w": torch.zeros(2, 2, dtype=torch.bfloat16)}
    grads = {"w": torch.full((2, 2), 0.5, dtype=torch.bfloat16)}
    learn = bf.chain(bf.adam(), bf.descend(0.0))
    state, square = learn.init(params, bf.random.key(0)), 0.0
    for _ in range(300):
        _, _, state = learn(params, grads, state)
        square = 0.999 * square + 0.001 * 0.5**2
    torch.testing.assert_close(state.slots["adam"]["square"]["w"], torch.full((2, 2), square), rtol=1e-4, atol=0)


# --- descend ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor(0.1).double(), schedules.constant(0.1)])
def test_descend_moves_every_leaf_against_its_gradient(lr, dtype):
    params = params_of(dtype)
    grads = gradients(0, params)
    learn = bf.chain(bf.descend(lr))
    moved, directions, _ = learn(params, grads, learn.init(params, bf.random.key(0)))
    tolerance = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for path, leaf in params.items():
        expected = [w - 0.1 * g for w, g in zip(leaf.flatten().tolist(), grads[path].flatten().tolist(), strict=True)]
        assert moved[path].dtype == dtype
        torch.testing.assert_close(
            moved[path].flatten().double(), torch.tensor(expected).double(), rtol=tolerance, atol=tolerance
        )
        assert directions[path] is grads[path]


def test_number_tensor_and_schedule_give_the_same_step():
    params = params_of()
    grads = gradients(0, params)
    rates = (0.1, torch.tensor(0.1, dtype=torch.float64), schedules.constant(0.1), lambda step: 0.1)
    moved = []
    for lr in rates:
        learn = bf.chain(bf.descend(lr))
        moved.append(learn(params, grads, learn.init(params, bf.random.key(0)))[0])
    for other in moved[1:]:
        assert all([torch.equal(other[path], moved[0][path]) for path in params])


def test_a_step_at_rate_zero_moves_nothing():
    params = params_of()
    learn = bf.chain(bf.descend(0))
    moved = learn(params, gradients(0, params), learn.init(params, bf.random.key(0)))[0]
    assert all([torch.equal(moved[path], params[path]) for path in params])


def test_the_learning_rate_may_be_given_at_the_step():
    params = params_of()
    grads = gradients(0, params)
    learn, other = bf.chain(bf.descend(0.1)), bf.chain(bf.descend(0.5))
    state = learn.init(params, bf.random.key(0))
    moved, expected = learn(params, grads, state, lr=0.5)[0], other(params, grads, state)[0]
    assert all([torch.equal(moved[path], expected[path]) for path in params])
    with pytest.raises(ValueError, match=r"lr is -0\.5; it must lie in \[0, inf\)"):
        learn(params, grads, state, lr=-0.5)


def test_descend_is_differentiable_in_its_learning_rate():
    params = params_of()
    grads = gradients(0, params)

    def total(lr):
        learn = bf.chain(bf.descend(lr))
        return sum([leaf.sum() for leaf in learn(params, grads, learn.init(params, bf.random.key(0)))[0].values()])

    slope = grad(total)(torch.tensor(0.1, dtype=torch.float64))
    torch.testing.assert_close(slope, -sum([g.sum() for g in grads.values()]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lr", [-1, -1e-9, math.inf, math.nan])
def test_a_learning_rate_out_of_range_is_refused_by_name_value_and_range(lr):
    with pytest.raises(ValueError, match=rf"descend: lr is {lr}; it must lie in \[0, inf\)"):
        bf.descend(lr)


@pytest.mark.parametrize("lr", [True, "0.1", None, 1j])
def test_a_learning_rate_that_is_no_number_is_refused(lr):
    with pytest.raises(TypeError, match="lr"):
        bf.descend(lr)


def test_a_tensor_of_rates_is_refused_since_it_would_change_the_shape_of_leaves():
    with pytest.raises(ValueError, match=r"descend: lr has shape \(3,\); it must be a number or a 0-d tensor"):
        bf.descend(torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        (bf.sgd, {"momentum": 1.0}, r"sgd: momentum is 1\.0; it must lie in \[0, 1\)"),
        (bf.sgd, {"momentum": -0.1}, r"sgd: momentum is -0\.1"),
        (bf.sgd, {"weight_decay": -1.0}, r"sgd: weight_decay is -1\.0; it must lie in \[0, inf\)"),
        (bf.adam, {"beta1": 1.0}, r"adam: beta1 is 1\.0; it must lie in \[0, 1\)"),
        (bf.adam, {"beta2": -0.1}, r"adam: beta2 is -0\.1; it must lie in \[0, 1\)"),
        (bf.adam, {"eps": -1e-8}, r"adam: eps is -1e-08; it must lie in \[0, inf\)"),
        (bf.adam, {"weight_decay": -1.0}, r"adam: weight_decay is -1\.0"),
        (bf.adamw, {"beta2": 1}, r"adamw: beta2 is 1; it must lie in \[0, 1\)"),
        (bf.adamw, {"weight_decay": -1.0}, r"adamw: weight_decay is -1\.0"),
    ],
)
def test_a_hyperparameter_out_of_range_is_refused_by_rule_name_value_and_range(make, keywords, message):
    with pytest.raises(ValueError, match=message):
        make(**keywords)
