"""Composition: order, names, periods, selections, signals, memory, and the whole chain inside torch's transforms."""

import functools
import math
from functools import partial

import pytest
import torch
from helpers import assert_same, leaves, members, mlp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad

import biofunc as bf
from biofunc.rule import as_rule


def full_chain(nu=0.16, lr=0.05, **volume):
    return bf.chain(
        bf.crystallize,
        bf.adam(),
        partial(bf.volume_dependent_lr, normalise=not volume, **volume),
        partial(bf.fuzzy_learning_rates, nu=nu),
        bf.descend(lr),
        bf.every(3, bf.rejuvenate_weights),
    )


def mlp_loss(params, x, y):
    hidden = torch.tanh(x @ params["fc1.weight"].T + params["fc1.bias"])
    return torch.nn.functional.cross_entropy(hidden @ params["fc2.weight"].T + params["fc2.bias"], y)


def data(dtype=torch.float32):
    x = bf.random.normal(bf.random.key(99), (16, 6), dtype=dtype)
    return x, torch.arange(16) % 4


def train(learn, params, state, steps, **signals):
    x, y = data(params["fc1.weight"].dtype)
    for _ in range(steps):
        params, _, state = learn(params, grad(mlp_loss)(params, x, y), state, **signals)
    return params, state


# Order, names and what a chain refuses


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([bf.rejuvenate_weights, bf.descend(0.1)], "rejuvenate_weights behind descend"),
        ([bf.descend(0.1), partial(bf.fuzzy_learning_rates, nu=0.1)], "move fuzzy_learning_rates before descend"),
        ([bf.adam(), bf.crystallize, bf.fuzzy_learning_rates], "crystallize reads the raw gradient.*adam"),
        ([bf.adam(), bf.sgd()], "more than one optimizer: adam and sgd.*bf.where"),
        (
            [bf.descend(0.1), bf.named("again", bf.descend(0.1))],
            "more than one rule that moves parameters: descend and again",
        ),
        ([bf.rejuvenate_weights, bf.volume_dependent_lr], "move rejuvenate_weights behind descend"),
        ([bf.volume_dependent_lr, bf.volume_dependent_lr], "two rules are named 'volume_dependent_lr'.*bf.named"),
        ([bf.crystallize, bf.descend(0.1)], "crystallize writes.*nu=0"),
    ],
)
def test_an_order_that_cannot_be_right_is_refused_with_the_remedy(rules, message):
    with pytest.raises(ValueError, match=message):
        bf.chain(*rules)


@pytest.mark.parametrize("given", [lambda p, g, s: (p, g, s), bf.adam, bf.descend, 3, None])
def test_what_is_no_rule_is_refused(given):
    with pytest.raises(TypeError, match="is not a rule"):
        bf.chain(given)


def test_positional_arguments_cannot_be_bound():
    with pytest.raises(TypeError, match="positional"):
        bf.chain(partial(bf.crystallize, {}))


def test_nested_chains_flatten():
    inner = bf.chain(bf.volume_dependent_lr, bf.descend(0.1))
    assert [rule.name for rule in bf.chain(bf.adam(), inner, bf.rejuvenate_weights).rules] == [
        "adam",
        "volume_dependent_lr",
        "descend",
        "rejuvenate_weights",
    ]


def test_partial_every_where_and_named_carry_the_inner_rule():
    rule = bf.every(5, bf.where("fc*", partial(bf.rejuvenate_weights, dre=3.0)))
    assert (rule.name, rule.phase, rule.redraws, rule.bound["dre"]) == ("rejuvenate_weights", "weights", True, 3.0)
    assert bf.named("turnover", rule).name == "turnover"
    assert repr(bf.chain(rule)) == "chain(\n    every(5, where('fc*', rejuvenate_weights(dre=3.0))),\n)"


def test_two_rules_of_one_kind_have_noise_and_memory_of_their_own():
    params, grads = mlp()
    learn = bf.chain(bf.volume_dependent_lr, bf.named("second", bf.volume_dependent_lr))
    once = bf.chain(bf.volume_dependent_lr)
    _, twice_g, _ = learn(params, grads, learn.init(params, bf.random.key(0)))
    _, once_g, _ = once(params, grads, once.init(params, bf.random.key(0)))
    _, again_g, _ = once(params, once_g, once.init(params, bf.random.key(0)))
    assert not torch.equal(twice_g["fc1.weight"], again_g["fc1.weight"])


def test_a_chain_without_descend_only_transforms():
    params, grads = mlp()
    learn = bf.chain(bf.crystallize, partial(bf.fuzzy_learning_rates, nu=0.3))
    new_params, new_grads, state = learn(params, grads, learn.init(params, bf.random.key(0)))
    assert all(new_params[path] is params[path] for path in params)
    assert not torch.equal(new_grads["fc1.weight"], grads["fc1.weight"])
    assert state.step == 1


def test_a_chain_keeps_the_key_and_counts_steps():
    params, grads = mlp()
    learn = full_chain()
    state = learn.init(params, bf.random.key(4))
    _, _, new = learn(params, grads, state)
    assert torch.equal(new.key, state.key)
    assert new.step == state.step + 1


def test_order_of_inits_does_not_change_the_rates():
    params, _ = mlp()
    fuzzy = partial(bf.fuzzy_learning_rates, nu=0.4)
    one = bf.init(params, bf.random.key(0), bf.crystallize, fuzzy)
    two = bf.init(params, bf.random.key(0), fuzzy, bf.crystallize)
    assert_same(one.plasticity, two.plasticity)


# Signals and hyperparameters


def test_signals_reach_the_rules_that_declare_them_and_unknown_ones_raise():
    params, grads = mlp()
    seen = {}

    @bf.rule(phase="weights")
    def watch(params, grads, state, *, activity=None):
        seen["activity"] = activity
        return params, grads, state

    learn = bf.chain(watch, partial(bf.rejuvenate_weights, dre=math.inf))
    state = learn.init(params, bf.random.key(0))
    activity = {"fc1": torch.ones(5)}
    learn(params, grads, state, activity=activity, dre=4.0)
    assert seen["activity"] is activity
    with pytest.raises(TypeError, match=r"no rule of the chain takes 'los'; they take: activity, dre, rate, selection"):
        learn(params, grads, state, los=0.3)


def test_a_signal_may_be_addressed_to_one_rule_and_then_wins():
    params, grads = mlp()

    @bf.rule(phase="weights", ranges={"rate": "[0, 1)"})
    def shrink(params, grads, state, *, rate=0.0):
        return {path: (1 - rate) * w for path, w in params.items()}, grads, state

    learn = bf.chain(bf.fuzzy_learning_rates, shrink, bf.named("shrink.more", shrink))
    state = learn.init(params, bf.random.key(0))
    for compiled in (False, True):
        step = torch.compile(learn, backend="aot_eager", fullgraph=True) if compiled else learn
        for signals, left in (
            ({"rate": 0.5}, 0.25),
            ({"shrink.rate": 0.5}, 0.5),
            ({"shrink.more.rate": 0.75}, 0.25),
            ({"shrink.rate": torch.tensor(0.75), "rate": 0.5}, 0.125),
        ):
            wanted = {path: left * w if path in state.plasticity else w for path, w in params.items()}
            assert_same(step(params, grads, state, **signals)[0], wanted)
    for signals, error, message in (
        ({"grow.rate": 0.5}, TypeError, "no rule of the chain is named 'grow', as 'grow.rate' says; their"),
        ({".rate": 0.5}, TypeError, "no rule of the chain is named '', as '.rate' says"),
        ({"shrink.rat": 0.5}, TypeError, "shrink takes no keyword 'rat'; did you mean 'rate'"),
        ({"shrink.speed": 0.5}, TypeError, "shrink takes no keyword 'speed'; it takes: rate"),
        ({"shrink.more.rate": 2}, ValueError, "shrink.more: rate is 2; it must lie in"),
        ({"fuzzy_learning_rates.nu": 0.1}, TypeError, "nu acts at init"),
    ):
        with pytest.raises(error, match=message):
            learn(params, grads, state, **signals)
    with pytest.raises(TypeError, match=r"shrink takes no keyword 'grow.rate'; did you mean 'rate'"):
        shrink(params, grads, state, **{"grow.rate": 0.5})
    with pytest.raises(TypeError, match="no rule of the chain takes 'rate'; they take: nothing"):
        bf.chain()(params, grads, state, rate=0.5)


def test_a_signal_that_is_needed_may_be_addressed():
    params, grads = mlp()
    learn = bf.chain(bf.descend(0.1), bf.synaptic_scaling)
    state = learn.init(params, bf.random.key(0))
    activity = {path: torch.ones(len(params[path])) for path in state.plasticity}
    plain = learn(params, grads, state, activity=activity)
    assert_same(learn(params, grads, state, **{"synaptic_scaling.activity": activity}), plain)


def test_what_acts_at_init_is_refused_at_a_step_and_as_a_schedule():
    params, grads = mlp()
    state = bf.init(params, bf.random.key(0), bf.fuzzy_learning_rates)
    with pytest.raises(TypeError, match=r"nu acts at init.*bf\.init\(params, key"):
        bf.fuzzy_learning_rates(params, grads, state, nu=0.2)
    learn = bf.chain(bf.fuzzy_learning_rates)
    with pytest.raises(TypeError, match="nu acts at init"):
        learn(params, grads, state, nu=0.2)
    with pytest.raises(TypeError, match="nu acts at init and takes no schedule"):
        bf.chain(partial(bf.fuzzy_learning_rates, nu=bf.schedules.constant(0.1)))
    remedy = r"functools\.partial\(fuzzy_learning_rates, nu=…\), in bf\.chain\(…\) or in bf\.init"
    for call in (lambda: learn(params, grads, state, nu=0.2), lambda: learn.init(params, bf.random.key(0), nu=0.2)):
        with pytest.raises(TypeError, match=remedy):
            call()
    with pytest.raises(TypeError, match=r"init takes no keyword 'wher'; .*functools\.partial\(rule, wher=…\)"):
        bf.init(params, bf.random.key(0), bf.crystallize, wher="*")
    with pytest.raises(TypeError, match=r"no rule of the chain takes 'learning_rate'; they take: lr$"):
        bf.chain(bf.fuzzy_learning_rates, bf.descend(0.1))(params, grads, state, learning_rate=0.1)


def test_rate_bounds_must_not_cross_and_distributions_are_named_or_functions():
    params, _ = mlp()
    make = functools.partial(partial, bf.fuzzy_learning_rates)
    with pytest.raises(ValueError, match=r"rate_max is 0\.9; it must lie in \[1, inf\]"):
        bf.init(params, bf.random.key(0), make(rate_max=0.9))
    with pytest.raises(ValueError, match="'cauchy'; it must be one of baseline, uniform"):
        bf.chain(make(distribution="cauchy"))  # before anything is drawn
    with pytest.raises(TypeError, match=r"distribution is 3; give a name or a function \(key, weight, nu, path\)"):
        bf.chain(make(distribution=3))
    twos = bf.init(
        params, bf.random.key(0), make(distribution=lambda key, weight, nu, path: torch.full_like(weight, 1.25))
    )
    assert (twos.plasticity["fc1.weight"] == 1.25).all()


def test_an_unknown_selection_of_synapses_to_redraw_is_named():
    params, grads = mlp()
    with pytest.raises(ValueError, match="selection is 'large'; it must be 'small' or 'random'"):
        bf.rejuvenate_weights(params, grads, bf.init(params, bf.random.key(0)), selection="large")


def test_a_state_without_the_rule_or_of_another_model_is_refused():
    params, grads = mlp()
    plain = bf.init(params, bf.random.key(0))
    with pytest.raises(KeyError, match="state was made without crystallize"):
        bf.crystallize(params, grads, plain)
    with pytest.raises(TypeError, match="state is dict; make a BioState"):
        bf.crystallize(params, grads, {})
    wide = bf.init({**params, "fc1.weight": torch.ones(7, 6)}, bf.random.key(0), bf.crystallize)
    with pytest.raises(ValueError, match=r"fc1.weight.*\(5, 6\).*\(7, 6\).*another model"):
        bf.crystallize(params, grads, wide)
    with pytest.raises(TypeError, match="key is 0; a key is int64"):
        bf.init(params, 0)


# Periods


@pytest.mark.parametrize("n", [0, -1, True, 2.0])
def test_a_period_is_a_positive_integer(n):
    with pytest.raises((ValueError, TypeError), match="n is"):
        bf.every(n, bf.rejuvenate_weights)


def test_every_fires_when_step_plus_one_is_a_multiple():
    params, grads = mlp()
    learn = bf.chain(bf.every(3, bf.rejuvenate_weights))
    state = learn.init(params, bf.random.key(0))
    fired = []
    for _ in range(7):
        new, _, state = learn(params, grads, state)
        fired.append(not torch.equal(new["fc1.weight"], params["fc1.weight"]))
        params = new
    assert fired == [False, False, True, False, False, True, False]


def test_a_skipped_step_is_not_computed_eagerly_on_the_cpu():
    params, grads = mlp()
    calls = []

    @bf.rule(phase="weights")
    def counted(params, grads, state):
        calls.append(1)
        return params, grads, state

    learn = bf.chain(bf.every(4, counted))
    state = learn.init(params, bf.random.key(0))
    for _ in range(8):
        params, _, state = learn(params, grads, state)
    assert len(calls) == 2


def test_every_selects_alike_in_a_loop_under_vmap_and_compiled():
    params, grads, keys = members(3)
    learn = bf.chain(
        bf.every(2, bf.crystallize), bf.adam(), bf.fuzzy_learning_rates, bf.every(3, bf.rejuvenate_weights)
    )
    states = torch.vmap(learn.init)(params, keys)
    torch._dynamo.reset()
    compiled = torch.compile(torch.vmap(learn), backend="aot_eager", fullgraph=True)
    vmapped, by_compiler = (params, states), (params, states)
    alone = [[p, learn.init(p, k)] for p, k in bf.ensemble.unstack((params, keys))]
    for _ in range(6):
        vmapped = torch.vmap(learn)(vmapped[0], grads, vmapped[1])[::2]
        by_compiler = compiled(by_compiler[0], grads, by_compiler[1])[::2]
        alone = [learn(p, g, s)[::2] for (p, s), g in zip(alone, bf.ensemble.unstack(grads), strict=True)]
    assert_same(vmapped, by_compiler, ulps=4)
    # means over a leaf are summed in another order under vmap
    assert_same(vmapped, bf.ensemble.stack(alone), ulps=8)


# The whole chain inside torch's transforms


@pytest.mark.parametrize("size", [1, 3, 50])
def test_draws_inside_a_chain_are_those_of_the_key_in_a_loop_under_vmap_and_compiled(size):
    """By inductor, bit for bit; also next to another rule that draws, and at a step beyond the first."""

    @bf.rule(phase="weights")
    def reveal(params, grads, state, *, noise):
        return noise.draw(params, "uniform")[0], grads, state

    params = {"a": torch.zeros(size, 7, 5), "b": torch.zeros(size, 3, 1)}
    keys = bf.random.key(torch.arange(size) + 10**10)
    learn = bf.chain(bf.volume_dependent_lr, reveal)
    states = torch.vmap(learn.init)(params, keys)
    states = states.replace(step=states.step + 2**33)
    torch._dynamo.reset()
    vmapped = torch.vmap(learn)(params, params, states)[0]
    compiled = torch.compile(torch.vmap(learn), fullgraph=True)(params, params, states)[0]
    looped = bf.ensemble.stack([learn(p, p, s)[0] for p, s in bf.ensemble.unstack((params, states))])
    step_keys = bf.random.fold_in(bf.random.fold_in(keys, "reveal"), states.step)
    direct = {
        path: bf.random.uniform(bf.random.fold_in(step_keys, path), leaf.shape[1:]) for path, leaf in params.items()
    }
    for result in (vmapped, compiled, looped):
        assert_same(result, direct)


def test_full_chain_compiles_once_over_200_steps_of_schedule_and_step():
    """Inductor, five mechanisms and Adam, ensemble of 3: one compilation, equal to eager."""
    torch._dynamo.reset()
    with torch.device("meta"):
        layers = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    skeleton = bf.split_synapses(layers)
    params = {
        name: bf.random.normal(bf.random.fold_in(bf.random.key(1), name), (3, *p.shape))
        for name, p in skeleton.named_parameters()
    }
    learn = full_chain(lr=bf.schedules.cosine(0.01, 0.0, 200))
    states = torch.vmap(learn.init)(params, bf.random.key(torch.arange(3)))
    x, y = data()

    def step(params, state):
        loss = lambda p: torch.nn.functional.cross_entropy(functional_call(skeleton, p, (x,)), y)  # noqa: E731
        params, _, state = learn(params, grad(loss)(params), state)
        return params, state

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(torch.vmap(step), backend=counter, fullgraph=True)
    eager = compiled_run = (params, states)
    for i in range(200):
        compiled_run = compiled(*compiled_run)
        if i < 6:
            eager = torch.vmap(step)(*eager)
            # one step is equal to a few ulps; Adam's first steps divide tiny gradients by their own size
            torch.testing.assert_close(compiled_run[0], eager[0], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert (compiled_run[1].step == 200).all()
    assert all(leaf.isfinite().all() for leaf in leaves(compiled_run[0]).values())


def test_a_sweep_by_vmap_over_three_hyperparameters_equals_the_loop():
    params, _ = mlp(dtype=torch.float64)
    key = bf.random.key(0)

    def run(nu, lr, dampening_factor):
        learn = full_chain(nu=nu, lr=lr)
        return train(learn, params, learn.init(params, key), 4, dampening_factor=dampening_factor)

    nus, lrs, dampenings = torch.tensor([0.0, 0.1, 0.4]), torch.tensor([0.1, 0.01, 0.05]), torch.tensor([1.0, 0.5, 0.9])
    swept = torch.vmap(run)(nus, lrs, dampenings)
    looped = bf.ensemble.stack([run(*row) for row in zip(nus, lrs, dampenings, strict=True)])
    assert_same(swept, looped, ulps=256)  # means are summed in another order, then Adam divides by the root of a square


def test_gradient_of_the_final_loss_in_hyperparameters_equals_finite_differences():
    params, _ = mlp(dtype=torch.float64)
    learn = bf.chain(bf.volume_dependent_lr, partial(bf.fuzzy_learning_rates, nu=0.2), bf.descend(0.5))
    state = learn.init(params, bf.random.key(0))
    x, y = data(torch.float64)

    def final_loss(base_lr, stability_factor):
        trained, _ = train(learn, params, state, 5, base_lr=base_lr, stability_factor=stability_factor)
        return mlp_loss(trained, x, y)

    point = torch.tensor(0.7, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    gradient = grad(final_loss, argnums=(0, 1))(*point)
    for i in (0, 1):
        shift = [torch.tensor(1e-6 * (i == j), dtype=torch.float64) for j in (0, 1)]
        up = final_loss(*[p + s for p, s in zip(point, shift, strict=True)])
        down = final_loss(*[p - s for p, s in zip(point, shift, strict=True)])
        torch.testing.assert_close(gradient[i], (up - down) / 2e-6, rtol=1e-6, atol=1e-12)
        assert gradient[i].abs() > 1e-6


def test_autograd_leaves_as_hyperparameters_receive_gradients():
    params, _ = mlp()
    learn = bf.chain(bf.volume_dependent_lr, bf.descend(0.5))
    base_lr = torch.tensor(0.7, requires_grad=True)
    trained, _ = train(learn, params, learn.init(params, bf.random.key(0)), 2, base_lr=base_lr)
    mlp_loss(trained, *data()).backward()
    assert base_lr.grad.abs() > 0


# Turnover and what it resets


def test_redrawn_synapses_restart_and_others_keep_everything():
    params, _ = mlp()
    learn = bf.chain(
        bf.crystallize,
        bf.adam(),
        partial(bf.fuzzy_learning_rates, nu=0.3),
        bf.descend(0.05),
        partial(bf.rejuvenate_weights, dre=3.0),
    )
    quiet = bf.chain(*learn.rules[:-1], as_rule(bf.rejuvenate_weights).bind(dre=math.inf))
    params, state = train(quiet, params, learn.init(params, bf.random.key(0)), 5, crystal_thresh=1.0)
    after, after_state = train(learn, params, state, 1, crystal_thresh=1.0)
    kept, kept_state = train(quiet, params, state, 1, crystal_thresh=1.0)
    for path in ("fc1.weight", "fc2.weight"):
        new = after[path] != kept[path]
        assert 0 < new.sum() < new.numel()
        innate = state.innate(path)
        assert torch.equal(after_state.plasticity[path], torch.where(new, innate, kept_state.plasticity[path]))
        for entry in ("mean", "square", "count"):
            moments = after_state.slots["adam"][entry][path]
            assert (moments[new] == 0).all()
            assert torch.equal(moments[~new], kept_state.slots["adam"][entry][path][~new])
    assert after_state.slots["adam"]["count"]["fc1.bias"] == 6


@pytest.mark.parametrize("selection", ["small", "random"])
def test_turnover_has_the_expected_share_for_any_rate(selection):
    """250 leaves of 20 synapses at rate 0.13: 2.6 a call, rounded up with probability 0.6; bound of 5 sigma."""
    params = {f"{i}": bf.random.normal(bf.random.key(i), (4, 5)) for i in range(250)}
    state = bf.init(params, bf.random.key(1))
    new, _, _ = bf.rejuvenate_weights(params, params, state, rate=0.13, selection=selection)
    died = torch.tensor([(new[path] != params[path]).sum() for path in params])
    assert set(died.tolist()) == {2, 3}
    assert abs((died == 3).double().mean() - 0.6) < 5 * math.sqrt(0.6 * 0.4 / 250)


def test_turnover_by_dre_has_the_expected_share_of_the_formula():
    w = bf.random.normal(bf.random.key(0), (500, 400))
    state = bf.init({"w": w}, bf.random.key(1))
    share = torch.erfc(w.abs() * 8 / (w.abs().max() * math.sqrt(2))).double().mean().item()
    for selection in ("small", "random"):
        new, _, _ = bf.rejuvenate_weights({"w": w}, {"w": w}, state, selection=selection)
        died = new["w"] != w
        assert abs(died.double().mean() - share) < 5 * math.sqrt(share / w.numel())
        weak = w.abs() < w.abs().median()
        lift = died[weak].double().mean() / died[~weak].double().mean()
        assert lift > 2 if selection == "small" else abs(lift - 1) < 0.05
        assert new["w"][died].abs().max() <= w.abs().max()


def test_silent_weights_die_by_chance_not_by_place():
    w = torch.zeros(40, 50)
    w[0, 0] = 1.0
    new, _, _ = bf.rejuvenate_weights({"w": w}, {"w": w}, bf.init({"w": w}, bf.random.key(3)), rate=0.25)
    died = (new["w"] != w).flatten().nonzero().flatten()
    assert len(died) == 500
    assert died.double().mean() > 800  # the first 500 in order of place would have the mean 250


# Writing one's own rule


def test_a_rule_of_ones_own_is_treated_like_a_built_in():
    @bf.rule(phase="direction", ranges={"decay": "[0, 1)"}, memory={"trace": 0.0})
    def eligibility(params, grads, state, *, decay=0.9, name):
        trace = {path: decay * state.slots[name]["trace"][path] + g for path, g in grads.items()}
        return params, dict(trace), state.with_slot(name, trace=trace)

    params, grads = mlp()
    learn = bf.chain(partial(eligibility, decay=0.5), bf.named("slow", eligibility), bf.descend(0.1))
    state = learn.init(params, bf.random.key(0))
    for _ in range(2):
        params, direction, state = learn(params, grads, state)
    g = grads["fc1.weight"]
    assert torch.allclose(state.slots["eligibility"]["trace"]["fc1.weight"], 1.5 * g)
    assert torch.allclose(direction["fc1.weight"], 0.9 * g + 1.5 * g)
    assert "fc1.bias" not in state.slots["slow"]["trace"]
    with pytest.raises(ValueError, match=r"eligibility: decay is 1\.0; it must lie in \[0, 1\)"):
        eligibility(params, grads, state, decay=1.0)


def test_a_range_needs_a_keyword():
    with pytest.raises(TypeError, match="declares no keyword 'rate'"):

        @bf.rule(phase="weights", ranges={"rate": "[0, 1]"})
        def nothing(params, grads, state):
            return params, grads, state


def test_noise_is_drawn_once():
    @bf.rule(phase="weights")
    def greedy(params, grads, state, *, noise):
        noise.draw(params, "normal")
        noise.draw(params, "uniform")
        return params, grads, state

    params, grads = mlp()
    with pytest.raises(RuntimeError, match="a key is used once"):
        greedy(params, grads, bf.init(params, bf.random.key(0)))


# The state


def test_state_is_readable_and_replaceable():
    params, _ = mlp()
    state = bf.init(params, bf.random.key(0), bf.crystallize, bf.adam())
    text = repr(state)
    assert "fc1.weight: float32[5, 6]" in text
    assert "key=int64[2], step=int64[]" in text
    assert "tensor(" not in text
    assert state.replace(step=state.step + 1).step == 1
    with pytest.raises(TypeError, match="unexpected keyword"):
        state.replace(stepp=0)
    with pytest.raises(AttributeError):
        state.step = 1


def test_state_passes_through_both_pytree_registries():
    params, _ = mlp()
    state = bf.init(params, bf.random.key(0), bf.crystallize, bf.adam())
    flat, structure = torch.utils._pytree.tree_flatten(state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in flat)
    rebuilt = torch.utils._pytree.tree_unflatten(flat, structure)
    assert rebuilt.fresh == state.fresh == (("adam", "mean", 0.0), ("adam", "square", 0.0), ("adam", "count", 0.0))
    assert_same(rebuilt, state)
    assert len(leaves(state)) == len(flat)
    assert "slots/adam/mean/fc1.bias" in leaves(state)


def test_paths_that_collide_are_refused():
    with pytest.raises(ValueError, match="same path"):
        bf.init({"a/b": torch.ones(2, 2), "a": {"b": torch.ones(2, 2)}}, bf.random.key(0))
