"""What holds between rules, states and trees beyond a single rule, and what is refused before it can go wrong."""

import collections
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import assert_same, leaves, mlp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

import biofunc as bf

# Leaves are treated once


def test_optimizers_and_rates_may_divide_the_leaves_among_them():
    params, grads = mlp()
    learn = bf.chain(
        bf.where("*weight", bf.adam()),
        bf.where("*bias", bf.sgd(momentum=0.5)),
        bf.where("fc1*", partial(bf.fuzzy_learning_rates, nu=0.3)),
        bf.where("*weight", bf.descend(0.1)),
        bf.where("*bias", bf.named("descend biases", bf.descend(0.2))),
    )
    state = learn.init(params, bf.random.key(0))
    new, _, state = learn(params, grads, state)
    assert torch.equal(new["fc1.bias"], params["fc1.bias"] - 0.2 * grads["fc1.bias"])
    assert set(state.slots["sgd"]["momentum"]) == {"fc1.bias", "fc2.bias"}
    assert state.plasticity["fc2.weight"].dim() == 0
    overlapping = bf.chain(bf.where("fc1*", bf.adam()), bf.where("*weight", bf.sgd()))
    with pytest.raises(ValueError, match=r"more than one optimizer on 'fc1.weight': adam and sgd"):
        overlapping.init(params, bf.random.key(0))


def test_rates_are_applied_once():
    params, _ = mlp()
    twice = [partial(bf.fuzzy_learning_rates, nu=0.3), bf.named("more", partial(bf.fuzzy_learning_rates, nu=0.2))]
    with pytest.raises(ValueError, match="more than one rule that applies learning-rate factors"):
        bf.chain(*twice)
    with pytest.raises(ValueError, match=r"factors on 'fc1.weight': fuzzy_learning_rates and more"):
        bf.chain(*[bf.where("fc*", rule) for rule in twice]).init(params, bf.random.key(0))


def test_rates_that_are_written_are_applied_leaf_by_leaf():
    params, _ = mlp()
    learn = bf.chain(bf.crystallize, bf.where("fc1.weight", partial(bf.fuzzy_learning_rates, nu=0)))
    with pytest.raises(ValueError, match=r"crystallize writes rates of 'fc2.weight' that no rule applies there"):
        learn.init(params, bf.random.key(0))


def test_turnover_is_refused_where_adam_counts_for_the_leaf_as_a_whole():
    """Moments that restart under an old count would move a new synapse by several learning rates."""
    params, grads = mlp()
    state = bf.init(params, bf.random.key(0), bf.adam())
    with pytest.raises(ValueError, match=r"adam keeps one 'count' for all synapses of 'fc1.weight'.*bf.init too"):
        bf.rejuvenate_weights(params, grads, state)


# Trees and keys


def test_keys_of_an_ensemble_need_vmap():
    params, _ = mlp()
    for count in (1, 2, 3):
        with pytest.raises(ValueError, match=r"torch\.vmap\(learn\.init\)\(params, keys\)"):
            bf.init(params, bf.random.key(torch.arange(count)))


def test_grads_may_come_in_a_container_of_another_order():
    params, grads = mlp()
    ordered = collections.OrderedDict(reversed(list(grads.items())))
    learn = bf.chain(bf.sgd(momentum=0.5))
    _, from_dict, _ = learn(params, grads, learn.init(params, bf.random.key(0)))
    _, from_ordered, _ = learn(params, ordered, learn.init(params, bf.random.key(0)))
    assert list(from_ordered) == list(ordered)
    assert all(torch.equal(from_ordered[path], from_dict[path]) for path in params)


def test_the_model_in_place_of_its_parameters_is_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"params is Linear; give a tree of tensors, dict\(model"):
        bf.init(model, bf.random.key(0))


def test_a_module_parameter_and_its_gradient_enter_by_value():
    """Half a meta-gradient would be worse than none: autograd refuses."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    (gradient,) = torch.autograd.grad((weight**2).sum(), weight, create_graph=True)
    learn = bf.chain(bf.descend(0.1))
    new, _, _ = learn({"w": weight}, {"w": gradient}, learn.init({"w": weight}, bf.random.key(0)))
    assert not new["w"].requires_grad


def test_a_run_that_starts_from_module_parameters_drags_no_graph_behind_it():
    with torch.random.fork_rng():
        model = torch.nn.Linear(3, 2)
    x = torch.ones(4, 3)
    learn = bf.chain(bf.crystallize, bf.adam(), bf.fuzzy_learning_rates, bf.descend(0.1))
    params = dict(model.named_parameters())
    state = learn.init(params, bf.random.key(0))
    for _ in range(3):
        grads = grad(lambda p: functional_call(model, p, (x,)).square().sum())(params)
        params, directions, state = learn(params, grads, state)
    assert all(leaf.grad_fn is None for leaf in leaves((params, directions, state)).values())


def test_a_sweep_from_init_on_compiles_once_and_entries_share_no_memory():
    params, grads = mlp()

    def make(nu):
        return bf.chain(partial(bf.fuzzy_learning_rates, nu=nu), bf.descend(0.1))

    states = torch.vmap(lambda nu: make(nu).init(params, bf.random.key(0)))(torch.tensor([0.1, 0.2]))
    assert all(leaf.is_contiguous() for leaf in leaves(states).values())
    plain = bf.init(params, bf.random.key(0))
    assert len({leaf.data_ptr() for leaf in leaves(plain).values()}) == len(leaves(plain))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(torch.vmap(make(0.1)), backend=counter, fullgraph=True)
    run, several_grads = bf.ensemble.stack([(params, grads)] * 2)
    for _ in range(4):
        run, _, states = step(run, several_grads, states)
    assert counter.frame_count == 1


# Rules of one's own


def test_a_phase_a_choice_and_a_result_are_checked():
    with pytest.raises(ValueError, match="phase is 'weight'; it must be one of gradient, direction"):
        bf.rule(phase="weight")
    with pytest.raises(ValueError, match="selection is 'smal'; it must be 'small' or 'random'"):
        bf.every(100, partial(bf.rejuvenate_weights, selection="smal"))
    with pytest.raises(ValueError, match="normalise is 'no'; it must be True or False"):
        bf.chain(partial(bf.volume_dependent_lr, normalise="no"))
    params, grads = mlp()

    @bf.rule(phase="weights")
    def shapeless(params, grads, state):
        return {path: w.sum() for path, w in params.items()}, grads, state

    @bf.rule(phase="weights")
    def forgetful(params, grads, state):
        return params, {}, state

    state = bf.init(params, bf.random.key(0))
    with pytest.raises(ValueError, match=r"shapeless returned params leaf 'fc1.weight' of shape \(\) instead of"):
        shapeless(params, grads, state)
    with pytest.raises(ValueError, match=r"forgetful returned grads without 'fc1.weight'"):
        forgetful(params, grads, state)
    short = partial(bf.fuzzy_learning_rates, distribution=lambda key, weight, nu, path: torch.ones(7))
    with pytest.raises(ValueError, match=r"distribution gave rates of shape \(7,\) for 'fc1.weight'"):
        bf.init(params, bf.random.key(0), short)


def test_what_a_rule_of_ones_own_gets_wrong_is_named():
    params, grads = mlp()

    @bf.rule(phase="weights")
    def two(params, grads, state):
        return params, grads

    @bf.rule(phase="weights", memory={"trace": 0.0})
    def misspelt(params, grads, state, *, name):
        return params, grads, state.with_slot(name, trce=params)

    @bf.rule(phase="weights", memory={"trace": 0.0})
    def shrunk(params, grads, state, *, name):
        return params, grads, state.with_slot(name, trace={path: w.sum() for path, w in params.items()})

    state = bf.init(params, bf.random.key(0), two, misspelt, shrunk)
    for rule, message in (
        (two, r"two must return \(params, grads, state\)"),
        (misspelt, "misspelt kept an entry 'trce' that it did not have at init"),
        (shrunk, r"shrunk kept 'trace' of 'fc1.weight' in another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            rule(params, grads, state)
    with pytest.raises(TypeError, match=r"write @bf.rule\(phase=…\)"):
        bf.rule(lambda params, grads, state: (params, grads, state))
    for text in ("0..1", "[1, 0]", "0, 1", "[a, b]"):
        with pytest.raises(ValueError, match="is not in interval notation; write"):

            @bf.rule(phase="weights", ranges={"rate": text})
            def ranged(params, grads, state, *, rate=0.5):
                return params, grads, state

    with pytest.raises(ValueError, match=r"outside: the default rate=2.0 lies outside \[0, 1\]"):

        @bf.rule(phase="weights", ranges={"rate": "[0, 1]"})
        def outside(params, grads, state, *, rate=2.0):
            return params, grads, state


def decorated(**facts):
    def shrink(params, grads, state, rate=0.1):
        return {path: (1 - rate) * w for path, w in params.items()}, grads, state

    return bf.rule(phase="weights", **facts)(shrink)


def test_a_rule_that_writes_in_place_is_refused():
    @bf.rule(phase="weights")
    def shrink(params, grads, state):
        return {path: w.mul_(0.9) for path, w in params.items()}, grads, state

    @bf.rule(phase="direction")
    def flip(params, grads, state):
        grads["fc2.weight"].neg_()
        return params, grads, state

    for dtype in (torch.float32, torch.bfloat16):
        for rule, place in ((shrink, "params leaf 'fc1.weight'"), (flip, "grads leaf 'fc2.weight'")):
            params, grads = mlp(dtype=dtype)
            with pytest.raises(ValueError, match=rf"{rule.__name__} wrote into {place} in place; make a new tensor"):
                rule(params, grads, bf.init(params, bf.random.key(0)))
    with torch.inference_mode():  # which counts no writes
        params, grads = mlp()
        bf.crystallize(params, grads, bf.init(params, bf.random.key(0), bf.crystallize))
    bf.crystallize(params, grads, bf.init(params, bf.random.key(0), bf.crystallize))


def test_a_slot_takes_dicts_by_path():
    params, grads = mlp()

    @bf.rule(phase="weights", memory={"trace": 0.0})
    def keep(params, grads, state, *, name):
        return params, grads, state.with_slot(name, trace=params["fc1.weight"])

    with pytest.raises(TypeError, match=r"trace is Tensor; give a dict {path: tensor}, trace={path: … for path in"):
        keep(params, grads, bf.init(params, bf.random.key(0), keep))


def test_a_gradient_that_is_none_is_told_from_one_that_is_missing():
    model = torch.nn.Linear(3, 2, device="meta")
    params = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    learn = bf.chain(bf.descend(0.1))
    state = learn.init(params, bf.random.key(0))
    with pytest.raises(TypeError, match=r"grads leaf '(weight|bias)' is None: was backward\(\) called"):
        learn(params, grads, state)
    with pytest.raises(KeyError, match="grads has no leaf 'bias' that params has"):
        learn(params, {"weight": params["weight"]}, state)
    two = (params["weight"], params["bias"])
    state = learn.init(two, bf.random.key(0))
    with pytest.raises(TypeError, match="grads leaf '1' is None"):
        learn(two, (two[0], None), state)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bf.chain([bf.adam()]), TypeError, r"is not a rule; hand rules over one by one, bf.chain\(\*rules\)"),
        (
            lambda: bf.every(4, bf.chain(bf.adam())),
            TypeError,
            "a chain makes its state with its own init",
        ),
        (lambda: bf.chain(bf.adam), TypeError, r"adam is not a rule; call bf.adam to make one, bf.adam\(…\)"),
        (lambda: bf.fuzzy_learning_rates(nu=0.1), TypeError, r"functools.partial\(bf.fuzzy_learning_rates, …\) binds"),
        (lambda: bf.every(4, bf.adam()), ValueError, "would hand raw gradients on in between"),
        (lambda: bf.chain(bf.fuzzy_learning_rates, bf.adam()), ValueError, "move fuzzy_learning_rates behind adam"),
        (lambda: bf.sgd(lr=0.1), TypeError, r"sgd takes no lr, .*bf.chain\(bf.sgd\(\), bf.descend\(0.1\)\)"),
        (lambda: bf.sgd(0.1), TypeError, r"sgd takes no lr, given as 0.1"),
        (lambda: bf.adam(lr=0.1), TypeError, r"adam takes no lr, .*bf.descend\(0.1\)"),
        (lambda: bf.adamw(lr=0.1), TypeError, r"adamw takes no lr, .*bf.descend\(0.1\)"),
        (lambda: bf.init(mlp()[0], bf.random.key(0), where=["fc1.weight"]), TypeError, "a list is read as a tree of b"),
        (lambda: bf.rule(phase="weights", memory=["trace"]), TypeError, r"give a dict by name, .*: {'trace': 0.0}"),
        (lambda: decorated(ranges={"rate": "[0, 1)"}), TypeError, r"no keyword 'rate'; make the argument keyword-only"),
        (lambda: decorated(ranges={"speed": "[0, 1)"}), TypeError, "declares no keyword 'speed'$"),
        (lambda: bf.layers(torch.nn.Identity(), "Linear"), TypeError, "types holds 'Linear'; give layer classes"),
        (lambda: bf.split_synapses({}), TypeError, "model is dict; split_synapses takes an nn.Module"),
        (lambda: bf.split_synapses(torch.nn.Identity(), activation=torch.nn.ReLU), TypeError, "activation is .*ReLU"),
        (lambda: bf.ensemble.init(torch.nn.Identity(), [0]), TypeError, "make_model is Identity; give a function"),
        (lambda: bf.ensemble.init(torch.nn.Identity, 5), TypeError, "seeds is 5; give one integer per member"),
        (lambda: bf.schedules.piecewise(1.0, {1.5: 0.1}), TypeError, r"values names step 1.5; steps are integers"),
        (lambda: bf.schedules.cosine("a", 0.0, 10), TypeError, "start is 'a'; it must be a number or a 0-d tensor"),
        (lambda: bf.schedules.linear(0.1, float("nan"), 10), ValueError, "stop is nan; it must be finite"),
    ],
)
def test_a_misused_function_says_what_would_be_right(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_keyword_of_init_reaches_the_rule_as_well():
    seen = []

    def remember(params, state, *, scale=1.0):
        seen.append(scale)
        return state

    @bf.rule(phase="weights", init=remember)
    def scaled(params, grads, state, *, scale=1.0):
        seen.append(scale)
        return params, grads, state

    params, grads = mlp()
    learn = bf.chain(partial(scaled, scale=3.0))
    learn(params, grads, learn.init(params, bf.random.key(0)))
    assert seen == [3.0, 3.0]


def test_a_rule_that_is_skipped_derives_no_keys(monkeypatch):
    params, grads = mlp()
    learn = bf.chain(bf.descend(0.1), bf.every(10, bf.rejuvenate_weights))
    state = learn.init(params, bf.random.key(0))
    monkeypatch.setattr(bf.noise, "fold_in_names", None)
    learn(params, grads, state)
    with pytest.raises(TypeError):
        learn(params, grads, state.replace(step=state.step + 9))


# Numbers


def test_schedules_sweep_by_vmap():
    params, grads = mlp()

    def run(value):
        schedules = [bf.schedules.constant(value), bf.schedules.exponential(value, value, 5)]
        schedules += [bf.schedules.piecewise(value, {1: value / 2}), bf.schedules.cosine(value, value / 2, 9)]
        moved = {}
        for index, schedule in enumerate(schedules):
            learn = bf.chain(bf.descend(schedule))
            p, state = params, learn.init(params, bf.random.key(0))
            for _ in range(2):
                p, _, state = learn(p, grads, state)
            moved[index] = p
        return moved

    rates = torch.tensor([0.1, 0.5])
    assert_same(torch.vmap(run)(rates), bf.ensemble.stack([run(rate) for rate in rates]), ulps=2)


def test_a_large_exponent_leaves_normalised_factors_finite():
    params, grads = mlp()
    state = bf.init(params, bf.random.key(0))
    _, scaled, _ = bf.volume_dependent_lr(params, grads, state, normalise=True, stability_factor=1e5)
    assert all(g.isfinite().all() for g in scaled.values())


def test_meta_gradients_through_adam_survive_synapses_without_gradient():
    params = {"w": torch.ones(3, 1, dtype=torch.float64)}
    x = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)  # a dead pixel
    learn = bf.chain(bf.adam(), bf.descend(0.1))
    state = learn.init(params, bf.random.key(0))

    def final_loss(lr):
        p, s = params, state
        for _ in range(3):
            p, _, s = learn(p, grad(lambda p: ((x @ p["w"]) ** 2).sum())(p), s, lr=lr)
        return ((x @ p["w"]) ** 2).sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    difference = (final_loss(lr + 1e-6) - final_loss(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(final_loss)(lr), difference, rtol=1e-6, atol=0)


# Compilation


def test_a_compiled_step_tells_chains_apart():
    """Chains of one shape that differ in a number, a schedule, a period, a selection or a body."""
    params, grads = bf.ensemble.stack([mlp(seed) for seed in range(2)])
    keys = bf.random.key(torch.arange(2))

    def halve(factor):
        @bf.rule(phase="weights")
        def scaled(params, grads, state):
            return {path: factor * w for path, w in params.items()}, grads, state

        return scaled

    mask = {"fc1.weight": True, "fc1.bias": False, "fc2.weight": False, "fc2.bias": False}
    chains = [
        bf.chain(bf.descend(0.1)),
        bf.chain(bf.descend(0.2)),
        bf.chain(bf.descend(bf.schedules.constant(0.3))),
        bf.chain(bf.descend(bf.schedules.constant(0.4))),
        bf.chain(bf.where("fc1*", bf.descend(0.1))),
        bf.chain(bf.where("fc2*", bf.descend(0.1))),
        bf.chain(bf.where(mask, bf.descend(0.1))),
        bf.chain(bf.where({**mask, "fc1.bias": True}, bf.descend(0.1))),
        bf.chain(bf.where(lambda path, leaf: leaf.dim() == 1, bf.descend(0.1))),
        bf.chain(bf.where(lambda path, leaf: leaf.dim() == 2, bf.descend(0.1))),
        bf.chain(bf.every(2, bf.rejuvenate_weights)),
        bf.chain(bf.every(1, bf.rejuvenate_weights)),
        bf.chain(bf.named("other", bf.rejuvenate_weights)),
        bf.chain(partial(bf.rejuvenate_weights, dre=3.0)),
        bf.chain(partial(bf.rejuvenate_weights, selection="random")),
        bf.chain(halve(0.5)),
        bf.chain(halve(0.25)),
    ]
    states = [torch.vmap(learn.init)(params, keys) for learn in chains]

    def run(learn, state, compiled):
        def step(params, grads, state):
            return learn(params, grads, state)

        ensemble_step = torch.vmap(step)
        if compiled:
            ensemble_step = torch.compile(ensemble_step, backend="aot_eager", fullgraph=True)
        return ensemble_step(params, grads, state)[0]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):
        compiled = [run(learn, state, True) for learn, state in zip(chains, states, strict=True)]
    for learn, state, result in zip(chains, states, compiled, strict=True):
        assert_same(result, run(learn, state, False), ulps=4)


def test_importing_the_library_does_not_import_the_compiler():
    """The compiler alone takes longer than all else."""
    code = "import sys, biofunc; print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
