"""attach: the functional chain is the oracle, plain torch.optim where rules are off, a loop by hand for the rest."""

import copy
import datetime
import gc
import io
import math
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same, leaves
from torch import nn, optim
from torch.func import functional_call, grad

import biofunc as bf

KEY = bf.random.key(0)
GENERATOR = torch.Generator().manual_seed(0)
X, Y = [torch.randn(64, 16, size, generator=GENERATOR, dtype=torch.float64) for size in (6, 4)]
SGD, ADAM = partial(optim.SGD, lr=0.1, momentum=0.9), partial(optim.Adam, lr=0.01)
RATES = partial(bf.fuzzy_learning_rates, nu=0)


def built(make, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(dtype)


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


class Run:
    """A model in an ordinary training loop, with rules attached where some are given."""

    def __init__(
        self, optimizer_of, make=perceptron, *, dtype=torch.float64, wrap=lambda model: model, key=KEY, **rules
    ):
        self.model = wrap(built(make, dtype))
        self.optimizer = optimizer_of(self.model.parameters())
        self.attached = bf.attach(self.optimizer, self.model, key=key, **rules) if rules else None
        self.at = 0

    def loss(self, rows=slice(None)):
        dtype = next(self.model.parameters()).dtype
        return (self.model(X[self.at, rows].to(dtype)) - Y[self.at, rows].to(dtype)).square().mean()

    def backward(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=set_to_none)
        loss = self.loss()
        loss.backward()
        return loss

    def train(self, steps, *, closed=False):
        for _ in range(steps):
            if closed or isinstance(self.optimizer, optim.LBFGS):
                self.optimizer.step(partial(self.backward, set_to_none=False))
            else:
                self.backward()
                self.optimizer.step()
            self.at += 1
        return self

    @property
    def params(self):
        return {path: p.detach().clone() for path, p in self.model.named_parameters()}

    @property
    def grads(self):
        return {path: p.grad.clone() for path, p in self.model.named_parameters()}

    @property
    def memory(self):
        return copy.deepcopy(self.optimizer.state_dict()["state"])

    @property
    def state(self):
        return self.attached.state


def mask_of(w):
    return (torch.arange(w.numel()) % 3 == 0).reshape(w.shape)


@bf.rule(phase="weights", redraws=True)
def redraw(params, grads, state):
    """Puts 1/8 where the mask says so: which synapses are new is known beforehand."""
    masks = {path: mask_of(w) for path, w in params.items()}
    return {path: torch.where(masks[path], 0.125, w) for path, w in params.items()}, grads, state.restart(masks)


def times(factor, phase):
    """A rule for every leaf, which sees no half precision."""

    @bf.rule(phase=phase, every_leaf=True)
    def scale(params, grads, state):
        assert {g.dtype for g in grads.values()} <= {torch.float32, torch.float64}
        return params, {path: factor * g for path, g in grads.items()}, state

    return bf.named(f"{factor} times", scale)


HALVE = times(0.5, "direction")


@bf.rule(phase="direction", memory={"trace": 1.0}, every_leaf=True)
def traced(params, grads, state, *, name):
    """Adds what it remembers of earlier gradients."""
    kept = state.slots[name]["trace"]
    trace = {path: 0.9 * kept[path] + g for path, g in grads.items()}
    return params, {path: g + 0.01 * kept[path] for path, g in grads.items()}, state.with_slot(name, trace=trace)


def all_phases(turnover=None):
    """Thresholds and periods at which each rule acts within a few steps."""
    return {
        "gradient": [partial(bf.crystallize, crystal_thresh=0.05)],
        "update": [partial(bf.fuzzy_learning_rates, nu=0.5), bf.volume_dependent_lr],
        "weight": [turnover or bf.every(10, partial(bf.rejuvenate_weights, rate=0.2)), bf.enforce_dales_principle],
    }


def assert_close(left, right, tolerance=1e-12):
    """By default within what float64 leaves of some ten steps that round in another order."""
    assert left.keys() == right.keys()
    for path in left:
        torch.testing.assert_close(left[path], right[path], rtol=0, atol=tolerance, msg=lambda text, p=path: p + text)


def assert_equal(left, right):
    assert_close(left, right, 0.0)


def assert_redrawn(*weights):
    for w in weights:
        assert (w[mask_of(w)] == 0.125).all()


# --- the functional route ---


@pytest.mark.parametrize(
    ("rule", "optimizer_of", "lr"),
    [
        (bf.sgd(), optim.SGD, 0.1),
        (bf.sgd(momentum=0.9), partial(optim.SGD, momentum=0.9), 0.1),
        (bf.sgd(momentum=0.9, nesterov=True), partial(optim.SGD, momentum=0.9, nesterov=True), 0.1),
        (bf.adam(), optim.Adam, 0.01),
        (bf.adam(), partial(optim.Adam, fused=True), 0.01),
        (bf.adam(weight_decay=0.1), partial(optim.Adam, weight_decay=0.1), 0.01),
        (bf.adamw(weight_decay=0.1), partial(optim.AdamW, weight_decay=0.1), 0.01),
    ],
)
def test_training_is_that_of_the_chain_with_the_same_rules(rule, optimizer_of, lr):
    given = all_phases()
    run = Run(partial(optimizer_of, lr=lr), **given)
    params, start = run.params, run.params
    learn = bf.chain(*given["gradient"], rule, *given["update"], bf.descend(lr), *given["weight"])
    state = learn.init(params, KEY)
    for x, y in zip(X[:50], Y[:50], strict=True):
        grads = grad(lambda p, x=x, y=y: (functional_call(run.model, p, (x,)) - y).square().mean())(params)
        params, _, state = learn(params, grads, state)
    run.train(50)
    assert_close(run.params, params)
    assert_close(run.state.plasticity, state.plasticity)
    assert_close(run.state.polarity, state.polarity)
    assert run.state.step == state.step == 50
    assert all([(w != start[path]).all() for path, w in params.items()])
    rates = state.plasticity["0.weight"]
    assert rates.min() < 0.3 < 1.3 < rates.max()  # crystallised, and fuzzy


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.Adam, {}),
        (optim.Adam, {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
        (optim.Adam, {"betas": (0.5, 0.9), "eps": 1e-3, "foreach": True}),
        (optim.AdamW, {"amsgrad": True, "weight_decay": 0.1}),
    ],
)
def test_adam_with_redrawing_is_a_loop_in_which_each_synapse_counts_its_steps(kind, options):
    run = Run(partial(kind, lr=0.01, **options), update=[HALVE], weight=[bf.every(7, redraw)])
    params, group, coupled = run.params, run.optimizer.param_groups[0], kind is optim.Adam
    beta1, beta2 = group["betas"]
    mean, square, largest, count = [{path: torch.zeros_like(w) for path, w in params.items()} for _ in range(4)]
    for i in range(20):
        grads = grad(lambda p, i=i: (functional_call(run.model, p, (X[i],)) - Y[i]).square().mean())(params)
        for path, w in params.items():
            g = -grads[path] if group["maximize"] else grads[path]
            g = g + group["weight_decay"] * w if coupled else g
            mean[path] = beta1 * mean[path] + (1 - beta1) * g
            square[path] = beta2 * square[path] + (1 - beta2) * g * g
            largest[path] = torch.maximum(largest[path], square[path]) if group["amsgrad"] else square[path]
            count[path] = count[path] + 1
            root = (largest[path] / (1 - beta2 ** count[path])).sqrt() + group["eps"]
            update = mean[path] / (1 - beta1 ** count[path]) / root
            params[path] = (
                w - (0.01 if i < 10 else 0.002) * (update + (0 if coupled else group["weight_decay"] * w)) / 2
            )
            if (i + 1) % 7 == 0 and w.dim() == 2:
                params[path] = torch.where(mask_of(w), 0.125, params[path])
                for kept in (mean, square, largest, count):
                    kept[path] = torch.where(mask_of(w), 0.0, kept[path])
    run.train(10)
    group["lr"] = 0.002  # as a scheduler does
    assert_close(run.train(10).params, params)


# --- re-drawn synapses ---


def test_a_redrawn_synapse_moves_by_one_learning_rate_at_its_first_step_under_adam():
    run = Run(ADAM, weight=[bf.every(60, redraw)]).train(60)
    weights = [run.model[0].weight, run.model[2].weight]
    assert_redrawn(*weights)
    run.train(1)
    for w in weights:
        moved = (w.detach() - 0.125)[mask_of(w)].abs()
        # g / (|g| + eps) falls short of 1 by 1e-8 / |g|, and no gradient here is below 1e-5
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("optimizer_of", "fresh"),
    [
        (SGD, {"momentum_buffer": 0}),
        (partial(optim.Adam, lr=0.01, amsgrad=True), {"exp_avg": 0, "exp_avg_sq": 0, "max_exp_avg_sq": 0}),
        (partial(optim.Adamax, lr=0.01), {"exp_avg": 0, "exp_inf": 0}),
        (partial(optim.Adagrad, lr=0.01, initial_accumulator_value=0.5), {"sum": 0.5}),
        (partial(optim.Adadelta, lr=0.01), {"square_avg": 0, "acc_delta": 0}),
        (partial(optim.RMSprop, momentum=0.9, centered=True), {"square_avg": 0, "grad_avg": 0, "momentum_buffer": 0}),
        (partial(optim.Rprop, lr=0.03), {"step_size": 0.03, "prev": 0}),
    ],
)
def test_the_memory_of_the_optimizer_restarts_at_redrawn_synapses_and_only_there(optimizer_of, fresh):
    run, plain = Run(optimizer_of, weight=[bf.every(5, redraw)]).train(5), Run(optimizer_of).train(5)
    for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        mask = mask_of(p) if p.dim() == 2 else torch.zeros_like(p, dtype=torch.bool)
        assert torch.equal(p, torch.where(mask, 0.125, q))
        kept, expected = run.optimizer.state[p], plain.optimizer.state[q]
        for name in kept.keys() - fresh.keys():
            assert kept[name] == expected[name]  # counts
        for name, value in fresh.items():
            assert torch.equal(kept[name], torch.where(mask, value, expected[name]))
            assert (expected[name] != value).any()


def test_lbfgs_restarts_as_a_whole_when_a_synapse_is_redrawn():
    run = Run(partial(optim.LBFGS, max_iter=3, max_eval=10), weight=[bf.every(2, redraw)])
    memory, counts = run.optimizer.state[run.model[0].weight], []
    for _ in range(3):
        run.train(1)
        counts.append(memory["n_iter"])
    assert counts == [3, 0, 3]
    assert len(memory["old_dirs"]) == 2  # one per iteration after the first, none from before


# --- all optimizers ---

OPTIMIZERS = {
    **{name: partial(getattr(optim, name), lr=0.05) for name in ("SGD", "ASGD", "Adadelta", "Rprop")},
    **{name: partial(getattr(optim, name), lr=0.01) for name in ("Adam", "AdamW", "RAdam", "Adamax", "Adafactor")},
    **{name: partial(getattr(optim, name), lr=0.01) for name in ("Adagrad", "RMSprop")},
    "LBFGS": partial(optim.LBFGS, lr=0.1, max_iter=3),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_rules_of_all_phases_run_with(name):
    run = Run(OPTIMIZERS[name], **all_phases())
    start = run.params
    assert run.train(21).state.step == 21
    for path, w in run.params.items():
        assert w.isfinite().all()
        assert (w != start[path]).any()


@each_optimizer
@pytest.mark.parametrize("exact", [True, False], ids=["rules that return what they are given", "off settings"])
def test_rules_that_do_nothing_leave_the_training_as_it_is(name, exact):
    idle = [bf.named(phase, bf.rule(phase=phase)(lambda p, g, s: (p, g, s))) for phase in ("gradient", "direction")]
    rules = {"gradient": idle[:1], "update": idle[1:], "weight": [bf.every(1000, bf.rejuvenate_weights)]}
    if not exact:
        volume = partial(bf.volume_dependent_lr, base_lr=1, stability_factor=0, lr_variability=0)
        rules["gradient"], rules["update"] = [partial(bf.crystallize, dampening_factor=1)], [RATES, volume]
        rules["weight"] = [partial(bf.rejuvenate_weights, dre=math.inf)]
    run, plain = Run(OPTIMIZERS[name], **rules).train(10), Run(OPTIMIZERS[name]).train(10)
    # Off settings multiply the update by 1, and w - (w - after) is after up to an ulp of the larger of them (1e-16)
    assert_close(run.params, plain.params, 0.0 if exact else 1e-12)


def test_nadam_takes_every_rule_but_those_that_redraw():
    rules = {place: rules for place, rules in all_phases().items() if place != "weight"}
    run = Run(partial(optim.NAdam, lr=0.01), **rules).train(5)
    assert run.state.step == 5
    with pytest.raises(ValueError, match="8 learning rates at once; use Adam"):
        Run(partial(optim.NAdam, lr=0.01), **all_phases())


# --- closures ---


def test_sgd_with_a_closure_is_sgd_without():
    run, plain = Run(SGD, **all_phases()).train(12, closed=True), Run(SGD, **all_phases()).train(12)
    assert_equal(run.params, plain.params)
    assert_same(run.state, plain.state)
    assert run.optimizer.step(closure=run.backward).requires_grad  # by keyword too, and its loss comes back
    assert run.state.step == 13


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_all_evaluations_of_a_step_of_lbfgs_see_the_same_noise_and_the_state_advances_once(line_search_fn):
    seen, raw = [], []

    @bf.rule(phase="gradient")
    def jostle(params, grads, state, *, noise):
        (z,) = noise.draw(params, "normal")
        seen.append((z, grads))
        return params, {path: g + 0.01 * z[path] for path, g in grads.items()}, state

    settle = partial(bf.crystallize, crystal_thresh=1e9)
    lbfgs = partial(optim.LBFGS, max_iter=4, line_search_fn=line_search_fn)
    run = Run(lbfgs, gradient=[traced, jostle, settle], update=[RATES])

    def closure():
        loss = run.backward(set_to_none=False)
        raw.append(run.grads)
        return loss

    run.optimizer.step(closure)
    evaluations = len(seen)
    assert evaluations == len(raw) > 3
    for (z, given), g in zip(seen, raw, strict=True):
        assert_equal(z, seen[0][0])
        assert_equal(given, {path: g[path] + 0.01 for path in given})  # the memory of the step's beginning
    assert_equal(run.grads, raw[-1])
    assert run.state.step == 1
    assert (run.state.plasticity["0.weight"] == 0.6).all()  # dampened once, not at each evaluation
    assert torch.equal(run.state.slots["traced"]["trace"]["0.weight"], 0.9 + raw[0]["0.weight"])  # the first one's
    run.optimizer.step(closure)
    assert run.state.step == 2
    assert not torch.equal(seen[evaluations][0]["0.weight"], seen[0][0]["0.weight"])


# --- mixed precision ---


def scaled(optimizer_of, scale, *, clip=False, steps=12):
    run, scaler = Run(optimizer_of, dtype=torch.float32, **all_phases()), torch.amp.GradScaler("cpu", init_scale=scale)
    for run.at in range(steps):
        run.optimizer.zero_grad()
        scaler.scale(run.loss()).backward()
        if clip:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        scaler.step(run.optimizer)
        scaler.update()
    return run, scaler


each_fused = pytest.mark.parametrize("optimizer_of", [partial(o, fused=f) for o in (SGD, ADAM) for f in (False, True)])


@each_fused
@pytest.mark.parametrize("clip", [False, True])
def test_rules_see_unscaled_gradients_under_a_scaler(optimizer_of, clip):
    (run, _), (plain, _) = scaled(optimizer_of, 1024.0, clip=clip), scaled(optimizer_of, 1.0, clip=clip)
    assert_equal(run.params, plain.params)  # a power of 2 scales without rounding
    assert_same(run.state, plain.state)
    if not clip:
        assert_equal(run.params, Run(optimizer_of, dtype=torch.float32, **all_phases()).train(12).params)
    assert run.state.step == 12
    assert run.state.plasticity["0.weight"].min() < 0.3  # some have settled


@each_fused
def test_a_step_that_the_scaler_skips_changes_nothing(optimizer_of):
    run, scaler = scaled(optimizer_of, 1024.0, steps=9)
    before, memory, state = run.params, run.memory, run.state
    for overflow, steps in ((True, 9), (False, 10)):
        run.optimizer.zero_grad()
        scaler.scale(run.loss()).backward()
        run.model[2].bias.grad[1] += math.inf if overflow else 0
        scaler.step(run.optimizer)
        scaler.update()
        assert (run.state is state) == overflow
        assert run.state.step == steps
        assert all([torch.equal(w, before[path]) == overflow for path, w in run.params.items()])
        if overflow:
            assert_same(run.memory, memory)
    assert scaler.get_scale() == 512.0
    assert all([w.isfinite().all() for w in run.params.values()])


def test_training_under_autocast_keeps_weights_and_rates_in_float32():
    run = Run(ADAM, dtype=torch.float32, **all_phases())
    start = run.params
    for run.at in range(10):
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss()
        loss.backward()
        run.optimizer.step()
    assert all([w.isfinite().all() and (w != start[path]).any() for path, w in run.params.items()])
    assert {leaf.dtype for leaf in [*run.params.values(), *run.state.plasticity.values()]} == {torch.float32}
    assert run.state.step == 10


def test_the_update_of_bfloat16_parameters_is_computed_in_float32():
    made = partial(Run, partial(optim.SGD, lr=0.5), dtype=torch.bfloat16)
    run, plain = made(update=[times(1 / 3, "direction")], weight=[bf.every(2, redraw)]), made().train(1)
    before = run.params
    for path, w in run.train(1).params.items():
        old, after = before[path].float(), plain.params[path].float()
        assert torch.equal(w, (old - (old - after) * (1 / 3)).bfloat16())
        assert (w != after).any()
    run.train(1)
    assert_redrawn(run.model[0].weight, run.model[2].weight)
    assert {w.dtype for w in run.params.values()} == {torch.bfloat16}


# --- gradients that come in parts ---


def test_accumulated_halves_of_a_batch_train_as_the_whole_batch():
    run, plain = Run(ADAM, **all_phases()), Run(ADAM, **all_phases()).train(12)
    for run.at in range(12):
        run.optimizer.zero_grad()
        for rows in (slice(0, 8), slice(8, 16)):
            (run.loss(rows) / 2).backward()
        run.optimizer.step()
    assert_close(run.params, plain.params)
    assert_close(run.state.plasticity, plain.state.plasticity)
    assert run.state.step == 12


def test_grad_holds_after_the_step_what_backward_left_so_that_nothing_compounds():
    run = Run(partial(optim.SGD, lr=0.1), gradient=[times(2, "gradient")])
    total = {path: torch.zeros_like(w) for path, w in run.params.items()}
    for run.at in range(3):
        before = run.params
        grads = grad(lambda p: (functional_call(run.model, p, (X[run.at],)) - Y[run.at]).square().mean())(before)
        total = {path: total[path] + g for path, g in grads.items()}
        run.loss().backward()
        held, raw = [p.grad for p in run.model.parameters()], run.grads
        run.optimizer.step()
        assert all([p.grad is g for p, g in zip(run.model.parameters(), held, strict=True)])
        assert_equal(run.grads, raw)
        assert_close(raw, total)
        assert_close(run.params, {path: before[path] - 0.2 * total[path] for path in total})


# --- which parameters ---


def test_groups_schedules_and_foreign_parameters_are_those_of_the_optimizer():
    foreign = [nn.Parameter(torch.ones(3, 2, dtype=torch.float64)) for _ in range(2)]

    def grouped(params, other):
        *first, weight, bias = params
        second = {"params": [weight, bias, other], "lr": 0.3, "weight_decay": 0.1}
        return optim.SGD([{"params": first}, second], lr=0.1, momentum=0.9)

    run = Run(partial(grouped, other=foreign[0]), update=[HALVE], weight=[bf.every(4, redraw)])
    plain = Run(partial(grouped, other=foreign[1]))
    schedulers = [optim.lr_scheduler.StepLR(each.optimizer, 2) for each in (run, plain)]
    assert list(run.state.plasticity) == ["0.weight", "2.weight"]
    for i in range(6):
        before = plain.params
        for each, scheduler, other in zip((run, plain), schedulers, foreign, strict=True):
            each.optimizer.zero_grad()
            (each.loss() + (other**3).sum()).backward()
            each.optimizer.step()
            scheduler.step()
            each.at += 1
        for path, p in plain.model.named_parameters():  # by hand: half of what the optimizer did, and new synapses
            p.data.copy_((before[path] + p.data) / 2)
            if i == 3 and p.dim() == 2:
                p.data[mask_of(p)], plain.optimizer.state[p]["momentum_buffer"][mask_of(p)] = 0.125, 0.0
        assert_close(run.params, plain.params)
    assert torch.equal(*foreign)
    assert (foreign[0] != 1).all()


def test_the_memory_of_each_group_restarts_at_its_own_value():
    def grouped(params):
        params = list(params)
        return optim.Rprop([{"params": params[:2]}, {"params": params[2:], "lr": 0.03}], lr=0.01)

    run = Run(grouped, weight=[bf.every(3, redraw)]).train(3)
    for w, lr in ((run.model[0].weight, 0.01), (run.model[2].weight, 0.03)):
        step_size = run.optimizer.state[w]["step_size"]
        assert (step_size[mask_of(w)] == lr).all()
        assert (step_size[~mask_of(w)] != lr).any()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.active, self.frozen, self.idle = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False), nn.Linear(6, 4)

    def forward(self, x):
        return self.active(x) + self.frozen(x).tanh()


def test_frozen_and_unused_parameters_stay_with_all_that_is_kept_about_them_until_they_take_part():
    rules = all_phases(bf.every(3, redraw))
    rules["update"] += [traced]
    rules["weight"] += [bf.synaptic_scaling]
    run = Run(ADAM, Branches, **rules)
    params, state = run.params, leaves(run.state)
    kinds = {path.removesuffix("active.weight") for path in state if path.endswith("active.weight")}
    assert len(kinds) == 7  # rates, innate rates, polarity, activity and its count, trace, births
    for moving in (["active"], ["active", "frozen"]):
        for _ in range(12):
            run.attached.signal(activity={path: torch.ones(4).double() for path in run.state.plasticity})
            run.train(1)
        for layer in ("active", "frozen", "idle"):
            moves = layer in moving
            assert torch.equal(run.params[f"{layer}.weight"], params[f"{layer}.weight"]) != moves
            assert torch.equal(run.params[f"{layer}.bias"], params[f"{layer}.bias"]) != moves
            for kind in kinds:
                same = torch.equal(leaves(run.state)[f"{kind}{layer}.weight"], state[f"{kind}{layer}.weight"])
                assert same == (not moves or "innate" in kind or "polarity" in kind), (kind, layer)
        run.model.frozen.requires_grad_(True)


def test_a_rule_rests_while_the_only_leaf_it_acts_on_has_no_gradient():
    only = [bf.where("idle.weight", rule) for rule in (bf.crystallize, RATES, redraw)]
    run, plain = Run(ADAM, Branches, gradient=only[:1], update=only[1:2], weight=only[2:]), Run(ADAM, Branches)
    run.train(3)
    assert_equal(run.params, plain.train(3).params)
    assert run.state.step == 3
    run.model.idle(X[0]).square().sum().backward()
    run.optimizer.step()
    assert_redrawn(run.model.idle.weight)


def test_where_says_which_parameters_are_synapses():
    run = Run(SGD, weight=[redraw], where="0.*").train(1)
    assert set(run.state.plasticity) == {"0.weight", "0.bias"}
    for path, p in run.params.items():
        assert (p[mask_of(p)] == 0.125).all() == path.startswith("0."), path


def test_parameters_that_the_optimizer_does_not_train_are_left_alone():
    run = Run(lambda params: SGD([*params][:2]), weight=[redraw])
    before = run.params
    run.train(1)
    assert list(run.state.plasticity) == ["0.weight"]
    assert_redrawn(run.model[0].weight)
    assert all([torch.equal(w, before[path]) != path.startswith("0.") for path, w in run.params.items()])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()))


def test_a_tied_parameter_is_acted_upon_once_and_in_place():
    run, plain = Run(SGD, Tied, update=[HALVE], weight=[bf.every(2, redraw)]), Run(SGD, Tied)
    assert list(run.state.plasticity) == ["a.weight", "head.weight"]
    held, before = [(p, p.data_ptr()) for p in run.model.parameters()], run.params
    run.train(1)
    # Half of one update of torch.optim; acted upon twice it would be a quarter
    assert_close(run.params, {path: (before[path] + w) / 2 for path, w in plain.train(1).params.items()})
    run.train(1)
    assert run.model.a.weight is run.model.b.weight
    assert_redrawn(run.model.b.weight, run.model.head.weight)
    for p, (parameter, address) in zip(run.model.parameters(), held, strict=True):
        assert p is parameter
        assert p.data_ptr() == address


# --- wrapped models ---


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
def test_a_wrapped_model_trains_as_the_bare_one_under_the_same_paths(wrap):
    run, plain = Run(ADAM, wrap=wrap, **all_phases()).train(12), Run(ADAM, **all_phases()).train(12)
    assert list(run.params) != list(plain.params)
    for left, right in zip(run.params.values(), plain.params.values(), strict=True):
        assert torch.equal(left, right)
    assert_same(run.state, plain.state)


TURNOVER = [bf.every(2, bf.rejuvenate_weights)]


def compiled_and_parallel(model):
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")


def train_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    timeout, store = datetime.timedelta(seconds=60), f"file://{folder}/store"
    dist.init_process_group("gloo", store, timeout, world_size=2, rank=rank)
    parallel, weight = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True), TURNOVER
    try:
        refusal = Run(ADAM, wrap=compiled_and_parallel, key=bf.random.key(rank), weight=weight)
    except ValueError as error:
        refusal = str(error)
    run = Run(ADAM, wrap=parallel, weight=weight)
    for run.at in range(5):
        run.optimizer.zero_grad()
        run.loss(slice(8 * rank, 8 * rank + 8)).backward()
        run.optimizer.step()
    params = {path.removeprefix("module."): w for path, w in run.params.items()}
    torch.save({"refusal": refusal, "params": params, "state": run.state}, f"{folder}/{rank}.pt")
    # torch sometimes hangs when a DistributedDataParallel is taken down after its process group
    del run
    gc.collect()
    dist.destroy_process_group()


def test_ranks_train_alike_and_as_one_process_and_refuse_different_keys(tmp_path):
    ranks = torch.multiprocessing.spawn(train_on_a_rank, (str(tmp_path),), nprocs=2, join=False)
    try:
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=150)  # a rank that waits fails after 60
        while not ranks.join(timeout=1):
            assert datetime.datetime.now() < deadline
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    left, right = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert_equal(left["params"], right["params"])
    assert_same(left["state"], right["state"])
    assert "rank 1 has another key" in left["refusal"]
    assert "rank 0 has another key" in right["refusal"]
    assert_close(left["params"], Run(ADAM, weight=TURNOVER).train(5).params)


# --- checkpoints ---


def saved(run):
    """The three state_dicts as they come from a file."""
    file = io.BytesIO()
    torch.save([holder.state_dict() for holder in (run.model, run.optimizer, run.attached)], file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("optimizer_of", [ADAM, SGD, partial(optim.Adagrad, lr=0.1)])
@pytest.mark.parametrize("first", [2, 10], ids=["before the first re-drawing", "after it"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(optimizer_of, first):
    # At this turnover the first re-drawing spares the small layer: whether one was due must outlive the checkpoint
    rules = all_phases(bf.every(3, partial(bf.rejuvenate_weights, rate=0.02)))
    run, resumed = Run(optimizer_of, **rules).train(first), Run(optimizer_of, key=bf.random.key(1), **rules)
    holders = (resumed.model, resumed.optimizer, resumed.attached)
    for holder, state_dict in zip(holders, saved(run), strict=True):
        holder.load_state_dict(state_dict)
    resumed.at = first
    assert_equal(resumed.train(10).params, run.train(10).params)
    assert_same(resumed.state, run.state)
    assert_same(resumed.memory, run.memory)


@pytest.mark.parametrize("loaded", [["optimizer"], ["attached"], ["model", "attached"], ["optimizer", "attached"]])
@pytest.mark.parametrize(("there", "here"), [(10, 2), (2, 10)])
def test_steps_keep_their_size_when_a_part_of_a_checkpoint_is_loaded(loaded, there, here):
    other, run = [Run(ADAM, weight=[bf.every(3, redraw)]).train(steps) for steps in (there, here)]
    state_dicts = dict(zip(("model", "optimizer", "attached"), saved(other), strict=True))
    for name in loaded:
        getattr(run, name).load_state_dict(state_dicts[name])
    before = run.params
    for path, w in run.train(1).params.items():
        # Moments and ages of two runs do not match, yet a step is of Adam's size: no more than ten learning rates
        assert ((w == 0.125) | ((w - before[path]).abs() < 0.1)).all()
        assert (w != before[path]).any()


def rejuvenating(nu=0.5, make=perceptron, rule=bf.rejuvenate_weights):
    return Run(ADAM, make, update=[partial(bf.fuzzy_learning_rates, nu=nu)], weight=[rule]).attached


def other_rates(path, rate):
    state = rejuvenating().state
    return {"state": state.replace(plasticity={**state.plasticity, path: rate})}


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (dict, KeyError, "state_dict has no 'state'"),
        (lambda: {"state": rejuvenating().state}, KeyError, "state_dict has no 'rules'"),
        (lambda: dict([*rejuvenating().state_dict().items()][:2]), KeyError, "state_dict has no 'aged'"),
        (lambda: {**rejuvenating().state_dict(), "aged": ["w"]}, TypeError, r"state_dict\['aged'\] is list, not"),
        (
            lambda: rejuvenating().state_dict() | {"state": {}},
            TypeError,
            r"state_dict\['state'\] is dict, not a BioState",
        ),
        (
            lambda: rejuvenating(rule=redraw).state_dict(),
            ValueError,
            "made by the rules .*redraw.*attached are .*rejuv",
        ),
        (
            lambda: rejuvenating(make=Tied).state_dict(),
            ValueError,
            "for other parameters; they differ first at .*'0.bias'",
        ),
        (
            lambda: rejuvenating(make=lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))).state_dict(),
            ValueError,
            r"for other parameters; they differ first at \('2\.bias', \(4,\)\)",
        ),
        (
            lambda: rejuvenating(nu=0).state_dict(),
            KeyError,
            "lacks 'slots/fuzzy_learning_rates/innate/0.weight'; attach",
        ),
        (
            lambda: rejuvenating().state_dict() | other_rates("0.weight", torch.ones(())),
            ValueError,
            r"leaf 'plasticity/0\.weight' has shape \(\), here \(8, 6\)",
        ),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(other, error, message):
    attached = rejuvenating()
    state = attached.state
    with pytest.raises(error, match=message):
        attached.load_state_dict(other())
    assert attached.state is state


# --- its life ---


def test_after_detach_the_optimizer_goes_on_as_the_plain_one_and_rules_can_be_attached_again():
    run, plain = Run(ADAM, **all_phases()), Run(ADAM)
    with pytest.raises(ValueError, match=r"has rules attached already; detach\(\) them first"):
        bf.attach(run.optimizer, run.model, key=KEY, weight=[redraw])
    run.train(12).attached.detach()
    plain.model.load_state_dict(run.model.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    plain.at = 12
    assert_equal(run.train(5).params, plain.train(5).params)
    assert run.state.step == 12
    run.attached = bf.attach(run.optimizer, run.model, key=KEY, weight=[redraw])
    assert run.train(1).state.step == 1
    assert_redrawn(run.model[0].weight)


def test_nothing_is_kept_alive_once_optimizer_model_and_attachment_are_gone():
    run = Run(ADAM, **all_phases()).train(12)
    things = [weakref.ref(thing) for thing in (run.model, run.optimizer, run.attached, run.model[0].weight)]
    assert None not in [thing() for thing in things]
    del run
    assert [thing() for thing in things] == [None] * 4


def test_attach_changes_nothing_and_copies_of_model_and_optimizer_are_free_of_it():
    run = Run(ADAM)
    before, held = run.params, [(id(p), p.data_ptr()) for p in run.model.parameters()]
    run.attached = bf.attach(run.optimizer, run.model, key=KEY, **all_phases())
    assert_equal(run.params, before)
    assert [(id(p), p.data_ptr()) for p in run.model.parameters()] == held
    run.train(3)
    for copied in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        assert_equal(dict(copied(run.model).named_parameters()), dict(run.model.named_parameters()))
        optimizer, state = copied(run.optimizer), run.state
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert run.state is state


@pytest.mark.parametrize("closed", [False, True])
def test_what_a_rule_keeps_is_not_overwritten_by_what_happens_to_parameters_and_gradients(closed):
    kept = {}

    def hoard(phase):
        @bf.rule(phase=phase, memory={"param": 0.0, "grad": 0.0}, every_leaf=True)
        def hoarding(params, grads, state, *, name):
            kept[name] = copy.deepcopy({"param": params, "grad": grads})
            return params, grads, state.with_slot(name, param=params, grad=grads)

        return bf.named(phase, hoarding)

    @bf.rule(phase="gradient", init=lambda params, state, *, name: state.with_slot(name, start=params))
    def remember(params, grads, state):
        return params, grads, state

    run = Run(SGD, gradient=[hoard("gradient"), remember], update=[hoard("direction")], weight=[hoard("weights")])
    start = {path: w for path, w in run.params.items() if path in run.state.plasticity}
    run.model[0].weight.data.add_(1)
    run.train(2, closed=closed)
    run.model[0].weight.data.add_(1)
    run.optimizer.zero_grad(set_to_none=False)
    assert_equal(run.state.slots["remember"]["start"], start)
    assert kept.keys() == {"gradient", "direction", "weights"}
    for phase, entries in kept.items():
        for entry, expected in entries.items():
            assert_equal(run.state.slots[phase][entry], expected)


# --- signals ---


def test_activity_is_handed_over_before_each_step_and_forgotten_after_it():
    scaling = partial(bf.synaptic_scaling, rate=0.1)
    run, learn = Run(SGD, weight=[scaling]), bf.chain(bf.sgd(momentum=0.9), bf.descend(0.1), scaling)
    params, record = run.params, bf.record_activity(run.model)
    state = learn.init(params, KEY)

    def loss(params):
        y, activity = record(params, {}, X[run.at])
        return (y - Y[run.at]).square().mean(), activity

    for run.at in range(5):
        grads, activity = grad(loss, has_aux=True)(params)
        params, _, state = learn(params, grads, state, activity=activity)
        run.optimizer.zero_grad()
        value, activity = loss(dict(run.model.named_parameters()))
        value.backward()
        run.attached.signal(activity=activity)
        run.optimizer.step()
    assert_close(run.params, params)
    assert_close(run.state.activity, state.activity)
    params, memory, grads, state = run.params, run.memory, run.grads, run.state
    with pytest.raises(TypeError, match=r"activity is missing; .*attachment\.signal\(activity=activity\)"):
        run.optimizer.step()
    assert_equal(run.params, params)
    assert_equal(run.grads, grads)
    assert_same(run.memory, memory)
    assert run.state is state


def test_a_hyperparameter_can_be_given_for_one_step():
    run = Run(SGD, gradient=[partial(bf.crystallize, crystal_thresh=1e9)], update=[RATES])
    run.attached.signal(dampening_factor=0.5)
    run.train(2)
    assert (run.state.plasticity["0.weight"] == 0.5 * 0.6).all()
    with pytest.raises(TypeError, match="no attached rule takes 'dampening'; they take: crystal_thresh, dampening_fac"):
        run.attached.signal(dampening=0.5)
    with pytest.raises(TypeError, match="fuzzy_learning_rates: nu acts at init and cannot be given at a step"):
        run.attached.signal(nu=0.3)
    with pytest.raises(ValueError, match=r"crystallize: dampening_factor is 2; it must lie in \(0, 1\]"):
        run.attached.signal(dampening_factor=2)
    with pytest.raises(TypeError, match=r"no attached rule takes 'rate'; they take: (?!.*\bnu\b)"):
        run.attached.signal(rate=1)
    run.attached.signal(**{"crystallize.dampening_factor": 0.5, "dampening_factor": 0.25})
    run.train(1)
    assert (run.state.plasticity["0.weight"] == 0.5 * 0.6 * 0.5).all()
    with pytest.raises(TypeError, match=r"no attached rule is named 'settle', as .*: crystallize, fuzzy_learn"):
        run.attached.signal(**{"settle.dampening_factor": 0.5})
    with pytest.raises(ValueError, match=r"crystallize: dampening_factor is 2; it must lie in \(0, 1\]"):
        run.attached.signal(**{"crystallize.dampening_factor": 2})


# --- bad input ---


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"optimizer": "Adam"}, TypeError, "optimizer is str; give an optimizer of torch.optim"),
        ({"model": {}}, TypeError, "model is dict; give the nn.Module that the optimizer trains"),
        ({"model": nn.Module()}, ValueError, r"none of the model's parameters; make it with model\.parameters\(\)"),
        ({"key": 0}, TypeError, r"made by biofunc\.random\.key\(seed\)"),
        ({"where": "nothing*"}, ValueError, r"where='nothing\*' selects no synapse; the paths are: "),
        ({"weights": [redraw]}, TypeError, r"attach takes no argument 'weights'; did you mean weight=\?"),
        ({"rules": [redraw]}, TypeError, "no argument 'rules'; it takes key, gradient, update, weight, where"),
        ({"weight": []}, TypeError, r"no rules; give some in gradient=\[…\], update=\[…\] or weight=\[…\]"),
        ({"weight": bf.rejuvenate_weights}, TypeError, r"give a list of rules, weight=\[…\]"),
        ({"weight": [torch.relu]}, TypeError, r"relu is not a rule; decorate a function of your own with @bf\.rule"),
        ({"weight": [bf.volume_dependent_lr]}, ValueError, r"weight has vol.*phase direction; give it in update=\[…\]"),
        ({"update": [bf.crystallize]}, ValueError, r"update has crys.*phase gradient; give it in gradient=\[…\]"),
        ({"update": [bf.descend(0.1)]}, ValueError, r"a rule of phase descend; torch\.optim does its work"),
        ({"gradient": [redraw]}, ValueError, r"gradient has redraw.*phase weights; give it in weight=\[…\]"),
        ({"gradient": [bf.adam()]}, ValueError, r"a rule of phase optimizer; torch\.optim does its work"),
        ({"gradient": [RATES]}, ValueError, r"Adam divides constant factors .* out again; give it in update=\[…\]"),
        ({"gradient": [bf.crystallize]}, ValueError, r"crystallize writes .* no rule applies; give update=\[functools"),
        ({"update": [HALVE, HALVE]}, ValueError, r"two rules are named '0.5 times'; name one of them with bf\.named"),
        ({"update": [RATES, bf.named("b", RATES)]}, ValueError, "more than one rule that applies .*; keep one"),
    ],
)
def test_bad_input_is_refused_with_the_remedy_and_nothing_is_attached(given, error, message):
    run = Run(ADAM)
    rules = {} if {"gradient", "update", "weight"} & given.keys() else {"weight": [redraw]}
    with pytest.raises(error, match=message):
        bf.attach(**{"optimizer": run.optimizer, "model": run.model, "key": KEY, **rules, **given})
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_rates_may_stand_before_sgd_where_they_are_the_same_as_behind_it():
    fuzzy, settle = partial(bf.fuzzy_learning_rates, nu=0.5), partial(bf.crystallize, recovery=0.1)
    plain_sgd = partial(optim.SGD, lr=0.1)
    before, behind = Run(plain_sgd, gradient=[settle, fuzzy]), Run(plain_sgd, gradient=[settle], update=[fuzzy])
    assert_close(before.train(5).params, behind.train(5).params)


def test_sparse_gradients_are_refused_before_anything_changes():
    run = Run(partial(optim.SGD, lr=0.1), lambda: nn.Embedding(5, 3, sparse=True), update=[HALVE])
    before, state = run.params, run.state
    run.model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="the gradient of 'weight' is sparse"):
        run.optimizer.step()
    assert_equal(run.params, before)
    assert run.state is state


# --- the loop of pytorch_bio_transformations ---


@pytest.mark.parametrize("optimizer_of", [partial(optim.Adam, lr=0.001), partial(optim.SGD, lr=0.01)])
def test_the_training_loop_of_the_original_needs_one_line(optimizer_of):
    draw = torch.Generator().manual_seed(1)
    loader = [(torch.randn(32, 784, generator=draw), torch.randint(10, (32,), generator=draw)) for _ in range(5)]
    model = built(lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)), torch.float32)
    criterion, optimizer = nn.CrossEntropyLoss(), optimizer_of(model.parameters())
    rates, turnover = [bf.volume_dependent_lr, bf.fuzzy_learning_rates], [bf.every(len(loader), bf.rejuvenate_weights)]
    attached = bf.attach(optimizer, model, key=KEY, gradient=[bf.crystallize], update=rates, weight=turnover)
    start = copy.deepcopy(model)
    for step, (data, target) in enumerate(loader * 2):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        loss = criterion(model(data), target)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        for layer, old in ((model[0], before[0]), (model[2], before[2])):
            # An ordinary step moves a weight by less than 0.01, a re-drawing by its size, which is 0.03 and more
            jumped = ((layer.weight - old.weight).abs() > 0.01).double().mean()
            assert jumped > 0.02 if step % 5 == 4 else jumped == 0
    for p, old in zip(model.parameters(), start.parameters(), strict=True):
        assert (p != old).any()
    for rate in attached.state.plasticity.values():
        assert rate.std() > 0.05
    assert attached.state.step == 10


def test_parameters_that_come_to_the_optimizer_later_are_not_trained_in_silence():
    run = Run(lambda params: SGD([*params][:2]), weight=[redraw]).train(1)
    foreign = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    run.optimizer.add_param_group({"params": [foreign]})
    run.train(1)
    run.optimizer.add_param_group({"params": [run.model[2].weight]})
    before, state = run.params, run.state
    with pytest.raises(ValueError, match=r"'2\.weight' came to the optimizer after the rules.*attach again"):
        run.train(1)
    assert_equal(run.params, before)
    assert run.state is state


def test_detached_rules_take_no_signals():
    run = Run(SGD, weight=[bf.synaptic_scaling])
    run.attached.detach()
    with pytest.raises(RuntimeError, match="the rules are detached"):
        run.attached.signal(activity={})


def test_a_step_after_one_that_failed_sees_the_gradient_that_backward_left():
    rules = {"gradient": [times(2.0, "gradient")], "update": [HALVE]}
    run, plain = Run(SGD, **rules), Run(SGD, **rules)
    run.optimizer.zero_grad()
    run.loss().backward()
    step, torch_sgd = run.optimizer.step, optim.SGD._init_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.SGD, "_init_group", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step()
    assert optim.SGD._init_group is torch_sgd
    step()
    assert_equal(run.params, plain.train(1).params)


def test_lazy_layers_have_to_be_run_before():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are new
        model = nn.LazyLinear(4)
    with pytest.raises(ValueError, match="has no shape yet; run the model once"):
        bf.attach(SGD(model.parameters()), model, weight=[redraw], key=KEY)
