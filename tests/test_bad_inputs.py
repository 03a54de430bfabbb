"""Bad input, one table: every error names what was given, its value and what would be right, and changes nothing."""

import copy
import dataclasses
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import nn

import biofunc as bf
from biofunc import __main__ as command
from biofunc import distributions, ensemble, measure, plot, random, schedules


@dataclasses.dataclass
class World:
    """What users have in hand when they make a mistake."""

    key: Any
    params: Any
    grads: Any
    rules: Any
    state: Any
    model: Any
    optimizer: Any
    folder: Any


@pytest.fixture
def world(tmp_path):
    params = {"a": torch.linspace(-1, 1, 6).reshape(2, 3), "b": torch.ones(2)}
    grads = {path: leaf / 10 for path, leaf in params.items()}
    key = random.key(0)
    rules = [bf.crystallize, bf.fuzzy_learning_rates, bf.synaptic_scaling, bf.temporal_learning_rates]
    with torch.random.fork_rng():
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return World(key, params, grads, rules, bf.init(params, key, *rules), model, optimizer, tmp_path)


def make_model():
    return nn.Sequential(nn.Linear(3, 4))


def fuzzy(w, **keywords):
    return bf.init(w.params, w.key, partial(bf.fuzzy_learning_rates, **keywords))


def crystallize(w, **keywords):
    return bf.crystallize(w.params, w.grads, w.state, **keywords)


def scale(w, **keywords):
    return bf.synaptic_scaling(w.params, w.grads, w.state, **keywords)


def dale(w, **keywords):
    return bf.init(w.params, w.key, partial(bf.enforce_dales_principle, **keywords))


def attach(w, **keywords):
    return bf.attach(w.optimizer, w.model, **{"key": w.key, **keywords})


def decorate(function, **facts):
    return bf.rule(**{"phase": "weights", **facts})(function)


def untouched(params, grads, state, *, size=0.5):
    return params, grads, state


half = torch.tensor(0.5)
V, T, K = ValueError, TypeError, KeyError

ROWS = [
    # random
    (lambda w: random.key(1.5), T, "seed is 1.5 (float); a seed must be an integer"),
    (lambda w: random.key(True), T, "seed is True (bool); a seed must be an integer"),
    (lambda w: random.key(None), T, "seed is None (NoneType); a seed must be an integer"),
    (lambda w: random.key(2**64), V, "seed is 18446744073709551616; it must lie in [-2^63, 2^64)"),
    (lambda w: random.key(torch.tensor(1.0)), T, "dtype torch.float32; a seed tensor must be int64"),
    (lambda w: random.split(0), T, "key is 0; a key is int64 of shape (..., 2), made by biofunc.random.key(seed)"),
    (lambda w: random.split(w.key, 2.0), T, "num is 2.0; the number of keys is an integer"),
    (lambda w: random.split(w.key, 0), V, "num is 0; it must be at least 1"),
    (lambda w: random.fold_in(w.key, None), T, "data is None (NoneType); fold_in takes integers, names"),
    (lambda w: random.fold_in(w.key, half), T, "data is a tensor of dtype torch.float32; fold_in takes integers"),
    (lambda w: random.uniform(w.key, 3), T, "shape is 3; give a tuple of integers, (3,)"),
    (lambda w: random.uniform(w.key, (2.5,)), T, "shape is (2.5,); it must hold integers"),
    (lambda w: random.uniform(w.key, (-2,)), T, "shape is (-2,); it must hold integers of at least 0"),
    (lambda w: random.uniform(w.key, (2,), dtype=torch.int64), T, "dtype is torch.int64; uniform draws float32"),
    (lambda w: random.uniform(w.key.double(), (2,)), T, "key is torch.float64 (2,); a key is int64"),
    (lambda w: random.normal(w.key, None), T, "shape is None; give a tuple of integers"),
    (lambda w: random.normal(w.key, (-1, 2)), T, "shape is (-1, 2); it must hold integers of at least 0"),
    (lambda w: random.normal(w.key, (2,), dtype="float32"), T, "dtype is 'float32'; normal draws floating dtypes"),
    (lambda w: random.bernoulli(w.key, math.nan), V, "p is nan; a probability lies in [0, 1]"),
    (lambda w: random.bernoulli(w.key, "0.5"), T, "p is '0.5'; it must be a number or a tensor"),
    (lambda w: random.rademacher(w.key, (2,), dtype=torch.uint8), T, "dtype is torch.uint8, which cannot hold -1"),
    (lambda w: random.rademacher(w.key, (2,), dtype=float), T, "dtype is <class 'float'>, which cannot hold -1"),
    (lambda w: random.rademacher(w.key, "ab"), T, "shape is 'ab'; give a tuple of integers"),
    (lambda w: random.gamma(w.key, -1.0), V, "concentration is -1.0; a concentration is positive"),
    (lambda w: random.gamma(w.key, "1"), T, "concentration is '1'; it must be a number or a tensor"),
    (lambda w: random.gamma(w.key.expand(3, 2), 1.0), V, "key has shape (3, 2); gamma and beta take one key"),
    (lambda w: random.gamma(w.key, torch.ones(3), (2,)), V, "has shape (3,), which does not broadcast to shape (2,)"),
    (lambda w: random.gamma(w.key, 1.0, dtype=torch.int32), T, "dtype is torch.int32; gamma and beta draw floating"),
    (lambda w: random.beta(w.key, 0.0, 1.0), V, "a is 0.0; a concentration is positive"),
    (lambda w: random.beta(w.key, 1.0, None), T, "b is None; it must be a number or a tensor"),
    (lambda w: random.accelerate("no"), T, "on is 'no'; it must be True or False"),
    # schedules
    (lambda w: schedules.constant("0.1"), T, "value is '0.1'; it must be a number or a 0-d tensor"),
    (lambda w: schedules.constant(math.nan), V, "value is nan; it must be a number or inf"),
    (lambda w: schedules.constant(-math.inf), V, "value is -inf; it must be a number or inf"),
    (lambda w: schedules.linear(0, math.inf, 10), V, "stop is inf; it must be finite"),
    (lambda w: schedules.linear(0, 1, "10"), T, "steps is '10'; a number of steps is an integer"),
    (lambda w: schedules.linear(0, 1, math.nan), T, "steps is nan; a number of steps is an integer"),
    (lambda w: schedules.linear(0, math.nan, 10), V, "stop is nan; it must be finite"),
    (lambda w: schedules.cosine(True, 0, 10), T, "start is True; it must be a number"),
    (lambda w: schedules.cosine(1, 0, 0), V, "steps is 0; it must be at least 1"),
    (lambda w: schedules.exponential(1, "0.5", 10), T, "factor is '0.5'; it must be a number"),
    (lambda w: schedules.exponential(1, 0.0, 10), V, "factor is 0.0; it must be positive"),
    (lambda w: schedules.piecewise(1, [1, 2]), T, "values is list; give a dict of values by step"),
    (lambda w: schedules.piecewise(1, {0.5: 1}), T, "values names step 0.5; steps are integers"),
    (lambda w: schedules.piecewise(1, {0: 1}), V, "values names step 0; the value of step 0 is start"),
    (lambda w: schedules.piecewise(1, {2**63: 1}), V, "values names step 9223372036854775808; steps are counted"),
    (lambda w: crystallize(w, floor=schedules.constant(torch.ones(3))), V, "floor has shape (3,); it must be a number"),
    # init, chain, and what makes rules of rules
    (lambda w: bf.init(None, w.key), T, "params is None; give a tree of tensors, dict(model.named_parameters())"),
    (lambda w: bf.init(w.model, w.key), T, "params is Sequential; give a tree of tensors"),
    (lambda w: bf.init({"a": 1}, w.key), T, "params leaf 'a' is int; each leaf must be a floating-point tensor"),
    (lambda w: bf.init({"a": torch.ones(2, 2).int()}, w.key), T, "leaf 'a' has dtype torch.int32; learning moves"),
    (lambda w: bf.init(w.params, 0), T, "key is 0; a key is int64"),
    (lambda w: bf.init(w.params, w.key.expand(3, 2)), V, "key has shape (3, 2), so it holds several; an ensemble's"),
    (lambda w: bf.init(w.params, w.key, where=3), T, "where is 3; give a glob on paths, a predicate"),
    (lambda w: bf.init(w.params, w.key, where="z*"), V, "where='z*' selects no synapse; the paths are: a, b"),
    (lambda w: bf.init(w.params, w.key, where={"a": True}), K, "where has no leaf 'b' that params has; a mask tree"),
    (lambda w: bf.init(w.params, w.key, where={"a": 1, "b": 0}), T, "where leaf 'a' is 1; a mask tree holds True or"),
    (lambda w: bf.init(w.params, w.key, where={p: x > 0 for p, x in w.params.items()}), T, "a tensor of dtype"),
    (lambda w: bf.chain([bf.crystallize]), T, "is not a rule; hand rules over one by one, bf.chain(*rules)"),
    (lambda w: bf.chain("adam"), T, "adam is not a rule; call bf.adam to make one, bf.adam(…)"),
    (lambda w: bf.chain(bf.adam), T, "adam is not a rule; call bf.adam to make one, bf.adam(…)"),
    (lambda w: bf.chain(w.optimizer), T, "SGD is not a rule; call bf.sgd to make one, bf.sgd(…)"),
    (lambda w: bf.chain(w.model), T, "Sequential is not a rule; decorate a function of your own"),
    (lambda w: bf.chain(bf.descend(0.1), bf.adam()), V, "adam acts on the gradient and stands after descend; move"),
    (lambda w: bf.chain(bf.descend(0.1), bf.descend(0.1)), V, "two rules are named 'descend'; name one of them"),
    (lambda w: bf.chain(bf.crystallize), V, "writes learning-rate factors that no rule applies; add"),
    (lambda w: bf.chain(bf.sgd(), bf.descend(1))(w.params, w.grads, w.state, gain=1), T, "no rule of the chain takes"),
    (lambda w: bf.every("2", bf.crystallize), T, "n is '2'; a period is an integer number of steps"),
    (lambda w: bf.every(0, bf.crystallize), V, "n is 0; a period is at least 1 step"),
    (lambda w: bf.every(2**63, bf.crystallize), V, "n is 9223372036854775808; steps are counted up to 2^63"),
    (lambda w: bf.every(2, bf.adam()), V, "every(2, adam) would hand raw gradients on in between; an optimizer acts"),
    (lambda w: bf.where(None, bf.crystallize), T, "where is None; give a glob on paths"),
    (lambda w: bf.init(w.params, w.key, bf.where(3, bf.crystallize)), T, "where is 3; give a glob on paths"),
    (lambda w: bf.init(w.params, w.key, bf.where("b", bf.crystallize)), V, "crystallize: where selects no synapse"),
    (lambda w: bf.where(bf.crystallize, "a*"), T, "a* is not a rule; decorate a function of your own"),
    (lambda w: bf.named(3, bf.crystallize), T, "name is 3; give a name, bf.named('another name', rule)"),
    (lambda w: bf.named("", bf.crystallize), T, "name is ''; give a name"),
    (lambda w: bf.layers(w.params, nn.Linear), T, "model is dict; layers takes an nn.Module and layer classes"),
    (lambda w: bf.layers(w.model, "Linear"), T, "types holds 'Linear'; give layer classes, bf.layers(model, torch.nn"),
    (lambda w: bf.layers(w.model, nn.Conv2d), V, "the model has no layer of type Conv2d"),
    # a rule at a step
    (lambda w: bf.crystallize(w.params, w.grads), T, "takes (params, grads, state) by position, and got 2 of them"),
    (lambda w: bf.crystallize(w.params, None, w.state), K, "grads has no leaf 'a' that params has; hand over one"),
    (lambda w: bf.crystallize(w.params, {**w.grads, "b": 1.0}, w.state), T, "grads leaf 'b' is float; it must be"),
    (lambda w: bf.crystallize(w.params, {**w.grads, "b": half}, w.state), V, "grads leaf 'b' has shape (), the param"),
    (lambda w: bf.crystallize(w.params, {**w.grads, "b": half.double().expand(2)}, w.state), T, "float64, the param"),
    (lambda w: bf.crystallize(w.params, w.grads, {}), T, "state is dict; make a BioState with bf.init or chain.init"),
    (lambda w: bf.crystallize({"a": w.params["a"]}, {"a": w.grads["a"]}, w.state), K, "was it made for another model?"),
    (lambda w: bf.rejuvenate_weights(w.params, w.grads, w.state, rate=1.0), V, "rate is 1.0; it must lie in [0, 1)"),
    (lambda w: bf.rejuvenate_weights(w.params, w.grads, w.state, dre=0), V, "dre is 0; it must lie in (0, inf]"),
    (lambda w: bf.volume_dependent_lr(w.params, w.grads, w.state, base_lr=0), V, "base_lr is 0; it must lie in (0, in"),
    (lambda w: bf.rejuvenate_weights_lognormal(w.params, w.grads, w.state, spread=-1), V, "spread is -1; it must lie"),
    (lambda w: bf.activity_dependent_rates(w.params, w.grads, w.state), T, "activity is missing; hand it over at each"),
    (lambda w: bf.enforce_dales_principle(w.params, w.grads, w.state), K, "made without enforce_dales_principle; hand"),
    (lambda w: bf.temporal_learning_rates(w.params, w.grads, w.state, nu=0.1), T, "nu acts at init and cannot be giv"),
    (lambda w: crystallize(w, dampening=0.5), T, "no keyword 'dampening'; did you mean 'dampening_factor'?"),
    (lambda w: crystallize(w, floor=2), V, "floor is 2; it must lie in [0, 1]"),
    (lambda w: crystallize(w, floor=math.nan), V, "floor is nan; it must lie in [0, 1]"),
    (lambda w: crystallize(w, floor=None), T, "floor is None; it must be a number or a 0-d tensor, or a schedule"),
    (lambda w: crystallize(w, floor=True), T, "floor is True; it must be a number or a 0-d tensor, or a schedule"),
    (lambda w: crystallize(w, floor=half.expand(2)), V, "floor has shape (2,); it must be a number or a 0-d tensor"),
    (lambda w: crystallize(w, floor=half + 0j), T, "floor is a tensor of dtype torch.complex64; it must be real"),
    (lambda w: crystallize(w, floor=half > 0), T, "floor is a tensor of dtype torch.bool; it must be real"),
    (lambda w: crystallize(w, floor=lambda step: "a"), T, "floor is 'a'; it must be a number or a 0-d tensor"),
    (lambda w: crystallize(w, freeze_silent=1), V, "freeze_silent is 1; it must be True or False"),
    (lambda w: crystallize(w, freeze_silent=half.expand(2)), V, "it must be True or False"),
    (lambda w: scale(w, activity=[1]), T, "activity is list; hand over a dict by path at each step"),
    (lambda w: scale(w, activity={}), K, "activity has no leaf 'a', only: (none); record it"),
    (lambda w: scale(w, activity={"a": 1.0}), T, "activity leaf 'a' is float; it must be a tensor"),
    (lambda w: scale(w, activity={"a": torch.ones(3)}), V, "activity leaf 'a' has shape (3,), its neurons"),
    (lambda w: scale(w, activity={"a": torch.ones(2) + 0j}), T, "leaf 'a' has dtype torch.complex64; it must be real"),
    (lambda w: scale(w, activity={"a": torch.ones(2)}, target="pop"), V, "target is 'pop'; give 'population', a numbe"),
    (lambda w: scale(w, activity={"a": torch.ones(2)}, form="cubic"), V, "form is 'cubic'; it must be 'linear' or"),
    # what acts at init
    (lambda w: fuzzy(w, nu=1), V, "nu is 1; it must lie in [0, 1)"),
    (lambda w: fuzzy(w, nu=schedules.constant(0.1)), T, "nu acts at init and takes no schedule; give a number or a"),
    (lambda w: fuzzy(w, distribution="cauchy"), V, "distribution is 'cauchy'; it must be one of baseline, uniform"),
    (lambda w: fuzzy(w, distribution=3), T, "distribution is 3; give a name or a function (key, weight, nu, path)"),
    (lambda w: fuzzy(w, distribution=lambda *given: None), T, "distribution gave NoneType for 'a'; it must give a ten"),
    (lambda w: fuzzy(w, distribution=lambda *given: half), V, "distribution gave rates of shape () for 'a'; one per"),
    (lambda w: fuzzy(w, distribution=distributions.layer_adaptive(["z"])), K, "layer_adaptive was made without 'a'"),
    (lambda w: distributions.layer_adaptive("a"), T, "paths is 'a'; give the paths of all layers, ['a', …]"),
    (lambda w: distributions.uniform(0, w.params["a"], 0.1, "a"), T, "key is 0; a key is int64"),
    (lambda w: dale(w, axis="rows"), V, "axis is 'rows'; it must be 'presynaptic', 'postsynaptic', or a dict"),
    (lambda w: dale(w, axis={"a": 5}), T, "axis of 'a' is 5; it must be a pair of integers (axis, groups)"),
    (lambda w: dale(w, axis={"a": (5, 1)}), V, "axis of 'a' is 5; the leaf has 2 dimensions, counted from 0"),
    (lambda w: dale(w, axis={"z": (1, 1)}), K, "axis names 'z' and no leaf of params; they are: a, b"),
    (lambda w: dale(w, sign="plus"), V, "sign is 'plus'; it must be 'majority' or 'drawn'"),
    # rules that are made
    (lambda w: bf.sgd(momentum=1.0), V, "momentum is 1.0; it must lie in [0, 1)"),
    (lambda w: bf.sgd(momentum=0.9, nesterov="yes"), V, "nesterov is 'yes'; it must be True or False"),
    (lambda w: bf.adam(beta1=math.nan), V, "beta1 is nan; it must lie in [0, 1)"),
    (lambda w: bf.adam(eps=-1e-8), V, "eps is -1e-08; it must lie in [0, inf)"),
    (lambda w: bf.adamw(weight_decay="0.1"), T, "weight_decay is '0.1'; it must be a number"),
    (lambda w: bf.descend(-1), V, "lr is -1; it must lie in [0, inf)"),
    (lambda w: bf.descend(math.inf), V, "lr is inf; it must lie in [0, inf)"),
    (lambda w: bf.rule(untouched), T, "write @bf.rule(phase=…) above the function, with its parentheses"),
    (lambda w: decorate(untouched, phase="late"), V, "phase is 'late'; it must be one of gradient, direction"),
    (lambda w: decorate(untouched, ranges={"size": "0..1"}), V, "range '0..1' is not in interval notation; write"),
    (lambda w: decorate(untouched, ranges={"size": "[1, 2]"}), V, "the default size=0.5 lies outside [1, 2]"),
    (lambda w: decorate(untouched, ranges={"width": "[0, 1]"}), T, "untouched declares no keyword 'width'"),
    (lambda w: decorate(untouched, memory=["trace"]), T, "memory is ['trace']; give a dict by name"),
    # models
    (lambda w: bf.record_activity(w.params), T, "model is dict; record_activity takes an nn.Module"),
    (lambda w: bf.record_activity(w.model, measure=nn.ReLU), T, "give a function of a tensor, torch.relu or torch.nn"),
    (lambda w: bf.presynaptic_axes(w.params), T, "model is dict; presynaptic_axes takes an nn.Module"),
    (lambda w: bf.split_synapses(w.params), T, "model is dict; split_synapses takes an nn.Module"),
    (lambda w: bf.split_synapses(w.model, 1.5), T, "gamma is 1.5; the number of contacts is an integer"),
    (lambda w: bf.split_synapses(w.model, 3), V, "gamma is 3 and does not divide the 4 outputs of layer '0'; name"),
    (lambda w: bf.split_synapses(w.model, skip=3), T, "skip is 3; give 'last', globs on names of layers, or None"),
    (lambda w: bf.split_synapses(w.model, skip="z"), V, "skip names 'z', which matches no layer; the layers are"),
    (lambda w: bf.split_synapses(w.model, activation="relu"), T, "activation is 'relu'; give a function of a tensor"),
    (lambda w: bf.l1_penalty(None), T, "params is None; give a tree of tensors"),
    (lambda w: bf.l1_penalty(w.params, where="z"), V, "where='z' selects no synapse; the paths are: a, b"),
    (lambda w: bf.attach(w.model, w.optimizer, key=w.key), T, "optimizer is Sequential; give an optimizer of torch"),
    (lambda w: attach(w), T, "no rules; give some in gradient=[…], update=[…] or weight=[…]"),
    (lambda w: attach(w, weight=bf.rejuvenate_weights), T, "give a list of rules, weight=[…]"),
    (lambda w: attach(w, gradient=[bf.rejuvenate_weights]), V, "a rule of phase weights; give it in weight=[…]"),
    (lambda w: attach(w, update=[bf.adam()]), V, "update has adam, a rule of phase optimizer; torch.optim does"),
    (lambda w: attach(w, key=0, weight=[bf.rejuvenate_weights]), T, "key is 0; a key is int64"),
    (lambda w: attach(w, weight=[bf.rejuvenate_weights], where="z"), V, "where='z' selects no synapse; the paths"),
    (lambda w: bf.convert(w.params), T, "model is dict; give an nn.Module, or a class or function that makes one"),
    (lambda w: bf.convert(w.model, crystal_tresh=1), T, "no setting 'crystal_tresh'; did you mean 'crystal_thresh'?"),
    (lambda w: bf.convert(w.model, config={}), T, "config is dict; give a BioConfig, bf.BioConfig(**config)"),
    (lambda w: bf.convert(w.model, lr=-1), V, "lr is -1; it must lie in [0, inf)"),
    (lambda w: bf.convert(w.model, mechanisms=("sleep",)), T, "mechanisms has no 'sleep'; they are: crystallize"),
    (lambda w: bf.BioConfig(1), T, "BioConfig takes settings by name: BioConfig(**settings)"),
    (lambda w: bf.BioConfig(base_lr=-1), V, "base_lr is -1; it must lie in (0, inf)"),
    (lambda w: bf.BioConfig(weight_splitting_Gamma=2.0), T, "weight_splitting_Gamma is 2.0; it must be an integer"),
    # ensembles
    (lambda w: ensemble.init(w.model, [1]), T, "make_model is Sequential; give a function that builds one"),
    (lambda w: ensemble.init(make_model, 3), T, "seeds is 3; give one integer per member, range(100)"),
    (lambda w: ensemble.init(make_model, []), V, "seeds is empty; an ensemble has at least one member"),
    (lambda w: ensemble.init(make_model, [1.5]), T, "seeds holds 1.5; every seed is an integer"),
    (lambda w: ensemble.init(lambda: nn.BatchNorm1d(3), [1]), V, "layers BatchNorm1d keep running statistics"),
    (lambda w: ensemble.stack([]), V, "members is empty; stack takes at least one tree"),
    (lambda w: ensemble.stack(w.params), T, "members is dict; give a list of trees, stack([first, second])"),
    (lambda w: ensemble.stack([{"a": 1}]), T, "leaf 'a' is int in member 0; all leaves are tensors"),
    (lambda w: ensemble.stack([w.params, w.params["a"]]), V, "member 1 is a tree of another structure than member 0"),
    (lambda w: ensemble.stack([half, half.double()]), T, "has dtype torch.float64 in member 1 and torch.float32"),
    (lambda w: ensemble.unstack({"a": w.params["a"], "c": torch.ones(3)}), V, "leaf 'c' has 3 members, the first"),
    (lambda w: ensemble.split(w.params, 0), V, "size is 0; give a number of members, at least 1"),
    (lambda w: ensemble.split(w.params, 2.0), T, "size is 2.0; give a number of members, an integer"),
    (lambda w: ensemble.join([w.params, w.params], 5), V, "members is 5, but 2 chunks of 2 hold 3 to 4; give"),
    # measures
    (lambda w: measure.turnover(w.params, w.params, threshold=-1), V, "threshold is -1; it must be 0 or larger"),
    (lambda w: measure.turnover(w.params, w.params, threshold="0"), T, "threshold is '0'; it must be a number or a"),
    (lambda w: measure.turnover(w.params, {"a": w.params["a"]}), K, "after has no leaf 'b' that params has"),
    (lambda w: measure.survival({"a": half}), V, "history leaf 'a' has shape (); all leaves share a first axis, time"),
    (lambda w: measure.sign_balance({"a": 1}), T, "params leaf 'a' is of int; it must be a floating-point tensor"),
    (lambda w: measure.dale_consistency(w.params, axis="rows"), V, "dale_consistency: axis is 'rows'; it must be"),
    (lambda w: measure.dale_consistency(w.params, polarity={}), K, "polarity has no leaf 'a', only: (none)"),
    (lambda w: measure.log_weight_skew(w.params, where="z"), V, "where='z' selects no synapse"),
    (lambda w: measure.log_weight_kurtosis({"a": torch.ones(2, 2).int()}), T, "leaf 'a' is of dtype torch.int32; it"),
    (lambda w: measure.crystallised_fraction(w.params), T, "state is dict; give the BioState of the run"),
    (lambda w: measure.crystallised_fraction(w.state, below=-1), V, "below is -1; it must be 0 or larger"),
    (lambda w: measure.rate_spectrum(w.state, edges=[1, 0.5]), V, "edges are [1, 0.5]; give two or more that rise"),
    (lambda w: measure.rate_spectrum(w.state, edges="fine"), T, "edges are 'fine'; give two or more numbers that rise"),
    (lambda w: measure.effective_number_of_rates(3), T, "state is int; give the BioState of the run"),
    (lambda w: measure.response_probe(3, w.params, w.state, [()], lambda p: half), T, "step is 3; it must be a func"),
    (lambda w: measure.response_probe(len, w.params, w.state, [()], lambda p: 1.0), T, "loss gives float; it must"),
    (lambda w: measure.response_probe(len, w.params, w.state, [], lambda p: half), V, "batches is empty; a response"),
    (lambda w: measure.dead_unit_fraction(w.params, threshold=-1), V, "threshold is -1; it must be 0 or larger"),
    (lambda w: measure.effective_rank(w.params["b"]), V, "features has shape (2,); give a matrix (samples, units)"),
    (lambda w: measure.effective_rank([[1.0]]), T, "features is of list; it must be a floating-point tensor"),
    # pictures
    (lambda w: plot.learning_curves({}), V, "curves is empty; give at least one"),
    (lambda w: plot.learning_curves([1.0, 2.0]), T, "curves is list; give a dict of curves by name"),
    (lambda w: plot.learning_curves(w.params, baseline="z"), V, "baseline is 'z'; the curves are a, b"),
    (lambda w: plot.learning_curves(w.params, symlog=0), V, "symlog is 0; it must be positive"),
    (lambda w: plot.survival_curve(w.params["a"], times=[1, 2]), V, "has shape (2, 3); give (members, time), with 2"),
    (lambda w: plot.size_distribution(torch.zeros(2, 2)), V, "params hold no weight other than 0; there is no size"),
    (lambda w: plot.size_distribution(w.params, ax=3), T, "ax is int; give axes of matplotlib"),
    (lambda w: plot.rate_spectrum(w.params["a"], edges=[0, 1]), V, "edges start at 0; the axis is logarithmic"),
    (lambda w: plot.forest({"a": (1, 2, 0)}), V, "intervals['a'] is (1, 2, 0); give (difference, low, high)"),
    # checkpoints
    (lambda w: bf.load(w.folder / "none"), OSError, "No such file or directory: '"),
    (lambda w: bf.save(w.folder / "z" / "x", {}), OSError, "cannot save (No such file or directory); make the fold"),
    (lambda w: bf.save(w.folder / "x", {"a": len}), T, "'a' is builtin_function_or_method; a checkpoint holds tensors"),
    # the command line
    (lambda w: command.main(["compare", "--arms", "sleep"]), SystemExit, "--arms: 'sleep' is no arm; the arms are"),
    (lambda w: command.main(["compare", "--seeds", "0"]), SystemExit, "--seeds: 0 is too few; give at least 1"),
    (lambda w: command.main(["compare", "--steps", "ten"]), SystemExit, "--steps: invalid int value: 'ten'"),
    (lambda w: command.main(["compare", "--optimizer", "lion"]), SystemExit, "'lion' is unknown; give sgd or adam"),
    (lambda w: command.main(["compare", "--lr", "nan"]), SystemExit, "--lr: nan is no learning rate; give a positive"),
    (lambda w: command.main(["compare", "--device", "abacus"]), SystemExit, "'abacus' is unknown; give cpu or cuda"),
    (lambda w: command.main(["compare", "--data", "imagenet"]), SystemExit, "data is 'imagenet'; it must be one of di"),
    (lambda w: command.main(["compare", "--out", "/dev/null/x"]), SystemExit, "--out: cannot write to '/dev/null/x'"),
    (lambda w: command.main(["experiment", "sleep"]), SystemExit, "study 'sleep' is unknown; give combination"),
    (lambda w: command.main(["experiment", "learning", "--seeds", "0"]), SystemExit, "seeds is 0; give a positive int"),
    (lambda w: command.main([]), SystemExit, "required: command"),
]


def test_the_table_is_long_and_no_row_stands_twice():
    assert len(ROWS) >= 200
    calls = [(call.__code__.co_code, call.__code__.co_consts, call.__code__.co_names) for call, _, _ in ROWS]
    assert len(set(map(repr, calls))) == len(ROWS)


@pytest.mark.parametrize(("call", "error", "message"), ROWS, ids=[message[:40] for _, _, message in ROWS])
def test_bad_input_is_named_with_its_value_and_the_remedy_and_changes_nothing(world, capsys, call, error, message):
    def held():
        return (world.key, world.params, world.grads, world.state, dict(world.model.state_dict()))

    before, groups = copy.deepcopy(held()), copy.deepcopy(world.optimizer.state_dict())
    with pytest.raises(error) as caught:
        call(world)
    said = capsys.readouterr().err if error is SystemExit else str(caught.value)
    assert message in said
    assert not re.search(r"object at 0x", said)
    assert len(said.rstrip("\n").split("\n")) == 1
    if error is SystemExit:
        assert caught.value.code == 2
    assert_same(held(), before)
    assert world.optimizer.state_dict() == groups
    assert not world.optimizer._optimizer_step_pre_hooks
    assert not list(world.folder.iterdir())
