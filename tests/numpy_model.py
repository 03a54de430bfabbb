"""All of learning in plain NumPy, written from the formulas: what the state machine compares biofunc with.

A `Model` holds parameters, gradients and state as arrays in the dtype in which rules compute, and a `Spec` says which
rule acts with which hyperparameters. Keys are derived by the oracle of Philox; what a key draws comes from
`biofunc.random`, which other tests compare with that oracle.
"""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from philox_oracle import key_of, oracle_fold_in, pair_of

from biofunc import random

ERFC = np.vectorize(math.erfc, otypes=[np.float64])


@dataclasses.dataclass
class Spec:
    """A rule of the model: kind of rule, name, hyperparameters (numbers or functions of the step), period, leaves."""

    kind: str
    name: str
    values: dict[str, Any]
    period: int = 1
    within: Any = None  # path -> bool
    every_leaf: bool = False

    @property
    def draws(self):
        return self.kind in DRAWING


DRAWING = {
    "volume_dependent_lr",
    "rejuvenate_weights",
    "rejuvenate_weights_lognormal",
    "temporal_learning_rates",
    "activity_dependent_rates",
}


def finite_mean(x, f):
    kept = x[np.isfinite(x)]
    return f(kept.astype(np.float64).mean()) if kept.size else f(0)


def finite_max(x, f):
    kept = x[np.isfinite(x)]
    return kept.max() if kept.size else f(0)


class Model:
    """Parameters, gradients and state as arrays."""

    def __init__(self, params, grads, key, synapses, specs, leaf_dtype):
        self.f = np.float64 if leaf_dtype == torch.float64 else np.float32
        self.leaf_dtype = leaf_dtype
        self.params = {path: self.array(leaf) for path, leaf in params.items()}
        self.grads = {path: self.array(leaf) for path, leaf in grads.items()}
        self.key, self.step = pair_of(key), 0
        self.plasticity = {path: self.f(1) for path in synapses}
        self.polarity, self.activity, self.slots, self.fresh = {}, {}, {}, []
        redraws = any(spec.kind.startswith("rejuvenate") for spec in specs)
        for spec in specs:
            self.initialise(spec, redraws)

    def array(self, leaf):
        return leaf.detach().to(torch.float64).numpy().astype(self.f)

    def rounded(self, x):
        """As the leaf holds it: bfloat16 keeps the upper half of a float32, rounded to even."""
        if self.leaf_dtype != torch.bfloat16:
            return x
        bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        kept = np.where(np.isnan(x), np.uint32(0x7FC00000), up.astype(np.uint32))
        return kept.astype(np.uint32).view(np.float32).reshape(np.shape(x))

    def paths(self, spec):
        chosen = self.params if spec.every_leaf else self.plasticity
        return [path for path in self.params if path in chosen and (spec.within is None or spec.within(path))]

    def innate(self, path):
        rate = None
        for slot in self.slots.values():
            if path in slot.get("innate", {}):
                rate = slot["innate"][path] if rate is None else rate * slot["innate"][path]
        return rate

    # Draws

    def leaf_key(self, name, when, path):
        return oracle_fold_in(oracle_fold_in(oracle_fold_in(self.key, name), when), path)

    def draw(self, spec, path, *kinds):
        seed, offset = self.leaf_key(spec.name, self.step, path)
        shape, values = self.params[path].shape, []
        for kind in kinds:
            shape_of_kind = () if kind == "coin" else shape
            draw = random.normal if kind == "normal" else random.uniform
            drawn = draw(key_of((seed, offset)), shape_of_kind).numpy()
            values.append(drawn.astype(self.f))
            offset += -(-max(1, math.prod(shape_of_kind)) // 4) if math.prod(shape_of_kind) else 0
        return values

    def drawn_at_init(self, spec, path, shape):
        return random.uniform(key_of(self.leaf_key(spec.name, "init", path)), shape).numpy().astype(self.f)

    # Init

    def initialise(self, spec, redraws):
        f, v = self.f, spec.values
        paths, slot = self.paths(spec), {}
        wide = {path: np.ones_like(self.params[path]) for path in paths}
        zero = {path: np.zeros_like(self.params[path]) for path in paths}
        if spec.kind == "crystallize":
            self.plasticity |= {path: self.plasticity[path] * wide[path] for path in paths}
        elif spec.kind in ("fuzzy_learning_rates", "temporal_learning_rates") and v.get("nu", 0.16) != 0:
            nu, slot["innate"] = f(v.get("nu", 0.16)), {}
            for path in paths:
                rate = 1 + nu * (2 * self.drawn_at_init(spec, path, wide[path].shape) - 1)
                if spec.kind == "fuzzy_learning_rates":
                    rate = np.clip(rate, f(0.5), f(2))
                slot["innate"][path] = rate
                self.plasticity[path] = self.plasticity[path] * rate
            if spec.kind == "temporal_learning_rates":
                slot["calls"] = {path: np.int64(0) for path in paths}
        elif spec.kind == "activity_dependent_rates":
            self.plasticity |= {path: self.plasticity[path] * wide[path] for path in paths}
            slot["innate"] = wide
        elif spec.kind == "synaptic_scaling":
            slot["count"] = {path: np.zeros(wide[path].shape[:1], f) for path in paths}
            self.activity |= {path: np.zeros(wide[path].shape[:1], f) for path in paths}
        elif spec.kind == "enforce_dales_principle":
            for path in paths:
                w = self.params[path].astype(np.float64)
                others = tuple(axis for axis in range(w.ndim) if axis != 1) if w.ndim > 1 else ()
                vote = np.where(np.isfinite(w), w, 0).sum(others, keepdims=True) if others else w
                chance = self.drawn_at_init(spec, path, (1, *vote.shape))[0]
                self.polarity[path] = np.where(np.where(vote == 0, chance < 0.8, vote > 0), f(1), f(-1))
        elif spec.kind == "sgd":
            slot["momentum"], self.fresh = zero, [*self.fresh, (spec.name, "momentum")]
        elif spec.kind in ("adam", "adamw"):
            slot = {"mean": zero, "square": copy.deepcopy(zero), "count": {}}
            for path in paths:
                slot["count"][path] = zero[path].copy() if redraws and path in self.plasticity else f(0)
            self.fresh += [(spec.name, entry) for entry in slot]
        elif spec.kind != "fuzzy_learning_rates":  # which keeps an empty slot where it draws nothing
            return
        self.slots[spec.name] = slot

    # A step

    def run(self, specs, activity, overrides):
        """One call of a chain."""
        for spec in specs:
            self.apply(spec, activity, overrides)
        self.step += 1

    def alone(self, spec, activity):
        """One call of a rule by itself."""
        self.apply(spec, activity, {})
        if spec.draws:
            self.key = oracle_fold_in(self.key, 0)

    def apply(self, spec, activity, overrides):
        if (self.step + 1) % spec.period:
            return
        values = {name: value(self.step) if callable(value) else value for name, value in spec.values.items()}
        values |= {name: value for name, value in overrides.items() if name in ACCEPTS.get(spec.kind, ())}
        before = (dict(self.params), dict(self.grads))
        with np.errstate(all="ignore"):
            getattr(self, "_" + spec.kind)(spec, self.paths(spec), activity, **values)
        for new, old in ((self.params, before[0]), (self.grads, before[1])):
            for path in new:
                if new[path] is not old[path]:
                    new[path] = self.rounded(new[path].astype(self.f))

    def restart(self, path, dies):
        if self.plasticity[path].shape == dies.shape:
            innate = self.innate(path)
            self.plasticity[path] = np.where(dies, self.f(1) if innate is None else innate, self.plasticity[path])
        for name, entry in self.fresh:
            kept = self.slots[name][entry]
            if path in kept:
                kept[path] = np.where(dies, self.f(0), kept[path])

    def _crystallize(
        self, spec, paths, activity, crystal_thresh=4.5e-5, dampening_factor=0.6, floor=0.0, recovery=0.0,
        freeze_silent=False,
    ):  # fmt: skip
        f = self.f
        for path in paths:
            size, push, rate = np.abs(self.params[path]), np.abs(self.grads[path]), self.plasticity[path]
            settled = (push < f(crystal_thresh) * size) | (push > finite_mean(size, f))
            if not freeze_silent:
                settled &= push > 0
            damped = np.minimum(rate, np.maximum(rate * f(dampening_factor), f(floor)))
            innate = self.innate(path)
            recovered = rate + f(recovery) * ((f(1) if innate is None else innate) - rate)
            self.plasticity[path] = np.where(settled, damped, recovered)

    def _fuzzy_learning_rates(self, spec, paths, activity, nu=0.16):
        for path in paths:
            self.grads[path] = self.grads[path] * self.plasticity[path]

    def _volume_dependent_lr(
        self, spec, paths, activity, base_lr=0.1, stability_factor=2.0, lr_variability=0.2, normalise=False
    ):
        f = self.f
        for path in paths:
            (z,) = self.draw(spec, path, "normal")
            size = np.abs(self.params[path])
            volume = size / (size + 1)
            factor = np.exp(-f(stability_factor) * volume) * np.abs(f(base_lr) + f(base_lr * lr_variability) * z)
            self.grads[path] = self.grads[path] * (factor / finite_mean(factor, f) if normalise else factor)

    def _rejuvenate_weights(self, spec, paths, activity, dre=8.0, rate=None, selection="small"):
        f = self.f
        for path in paths:
            w, small = self.params[path], selection == "small"
            first, new, coin = self.draw(spec, path, "normal" if small else "uniform", "uniform", "coin")
            size = np.abs(w)
            largest = finite_max(size, f)
            if rate is not None:
                tie = largest * np.finfo(f).eps + np.finfo(f).tiny
                frailty = (size + tie) / np.abs(first) if small else first
                number = math.floor(w.size * rate + float(coin))
                dies = np.zeros(w.size, bool)
                dies[np.argsort(frailty.reshape(-1), kind="stable")[:number]] = True
                dies = dies.reshape(w.shape) & (size < np.inf)
            elif small:
                dies = np.abs(first * (largest / f(dre))) > size
            else:
                share = finite_mean(ERFC(size.astype(np.float64) * (dre / (float(largest) * math.sqrt(2)))), f) if (
                    largest > 0
                ) else f(0)  # fmt: skip
                dies = (first < share) & (size < np.inf)
            grown = largest * (2 * new - 1)
            if path in self.polarity:
                grown = np.abs(grown) * self.polarity[path]
            self.params[path] = np.where(dies, grown, w)
            self.restart(path, dies)

    def _rejuvenate_weights_lognormal(self, spec, paths, activity, dre=8.0, spread=1.0):
        f = self.f
        for path in paths:
            w = self.params[path]
            death, z = self.draw(spec, path, "uniform", "normal")
            size = np.abs(w)
            mean = finite_mean(size, f)
            deviation = np.sqrt(finite_mean((w - finite_mean(w, f)) ** 2, f))
            sigma = f(spread) * np.sqrt(np.log1p(finite_mean((size - mean) ** 2, f) / mean**2))
            dies = (death < np.exp(-f(dre) * size / deviation)) & (deviation > 0)
            new = mean * np.exp(sigma * z - sigma * sigma / 2)
            sign = self.polarity[path] if path in self.polarity else np.where(w == 0, z, w)
            self.params[path] = np.where(dies, np.copysign(new, sign), w)
            self.restart(path, dies)

    def _temporal_learning_rates(
        self, spec, paths, activity, nu=0.16, decay=0.9995, renewal=0.1, renewal_period=10.0
    ):
        f, slot = self.f, self.slots[spec.name]
        for path in paths:
            (u,) = self.draw(spec, path, "uniform")
            slot["calls"][path] = slot["calls"][path] + 1
            old = slot["innate"][path]
            new = 1 + (old - 1) * f(decay)
            if slot["calls"][path] % renewal_period == 0:
                new = new + f(renewal * nu) * (2 * u - 1)
            slot["innate"][path] = np.clip(new, f(0.5), f(2))
            self.plasticity[path] = self.plasticity[path] * (slot["innate"][path] / old)

    def _activity_dependent_rates(self, spec, paths, activity, nu=0.16, gain=0.1):
        f, slot = self.f, self.slots[spec.name]
        for path in paths:
            (u,) = self.draw(spec, path, "uniform")
            a = activity[path].astype(f)
            mean = finite_mean(a, f)
            relative = np.where(np.isnan(a), f(1), a / mean) if mean > 0 else np.ones_like(a)
            width = f(nu) * (2 - np.clip(1 + f(gain) * (relative - 1), f(0.8), f(1.2)))
            width = width.reshape(-1, *[1] * (self.params[path].ndim - 1))
            new, old = np.clip(1 + width * (2 * u - 1), f(0.5), f(2)), slot["innate"][path]
            slot["innate"][path] = new
            self.plasticity[path] = self.plasticity[path] * (new / old)

    def _synaptic_scaling(
        self, spec, paths, activity, target="population", rate=1e-3, decay=0.99, form="linear"
    ):
        f, count = self.f, self.slots[spec.name]["count"]
        for path in paths:
            w, x, a = self.params[path], activity[path].astype(f), self.activity[path]
            seen = np.isfinite(x)
            count[path] = count[path] + seen.astype(f)
            share = ((1 - float(decay)) / (1 - float(decay) ** np.maximum(count[path], 1).astype(np.float64))).astype(f)
            moved = np.where(seen, x, a)
            mean = np.where(count[path] > 1, a + share * (moved - a), moved)
            self.activity[path] = mean
            goal = f(target) if target != "population" else finite_mean(np.where(count[path] > 0, mean, f(np.nan)), f)
            change = f(rate) * np.where(seen, goal - mean, f(0)).reshape(-1, *[1] * (w.ndim - 1))
            change = change * np.abs(w) if form == "quadratic" else np.broadcast_to(change, w.shape)
            self.params[path] = w * np.where(np.isfinite(change), np.maximum(1 + change, f(0.5)), f(1))

    def _enforce_dales_principle(self, spec, paths, activity):
        for path in paths:
            w = self.params[path]
            self.params[path] = np.where(w * self.polarity[path] < 0, self.f(0), w)

    def _sgd(self, spec, paths, activity, momentum=0.0, nesterov=False, weight_decay=0.0):
        f, slot = self.f, self.slots[spec.name]
        for path in paths:
            g = self.grads[path] + f(weight_decay) * self.params[path]
            m = f(momentum) * slot["momentum"][path] + g
            slot["momentum"][path] = m
            self.grads[path] = g + f(momentum) * m if nesterov else m + 0

    def _adam(self, spec, paths, activity, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
        f, slot = self.f, self.slots[spec.name]
        for path in paths:
            g = self.grads[path]
            g = g if decoupled else g + f(weight_decay) * self.params[path]
            m = slot["mean"][path] = f(beta1) * slot["mean"][path] + f(1 - beta1) * g
            v = slot["square"][path] = f(beta2) * slot["square"][path] + f(1 - beta2) * g * g
            t = slot["count"][path] = (slot["count"][path] + 1).astype(f)
            first, second = [f(1) - np.float64(beta) ** t.astype(np.float64) for beta in (beta1, beta2)]
            d = m / first.astype(f) / (np.sqrt(v / second.astype(f)) + f(eps))
            self.grads[path] = d + f(weight_decay) * self.params[path] if decoupled else d

    def _adamw(self, spec, paths, activity, weight_decay=1e-2, **values):
        self._adam(spec, paths, activity, weight_decay=weight_decay, decoupled=True, **values)

    def _descend(self, spec, paths, activity, lr):
        for path in paths:
            self.params[path] = self.params[path] - self.f(lr) * self.grads[path]

    # What is compared

    def everything(self):
        """All arrays by path, as a BioState and its trees flatten."""
        flat = {f"params/{path}": leaf for path, leaf in self.params.items()}
        flat |= {f"grads/{path}": leaf for path, leaf in self.grads.items()}
        for field in ("plasticity", "polarity", "activity"):
            flat |= {f"{field}/{path}": leaf for path, leaf in getattr(self, field).items()}
        for name, slot in self.slots.items():
            for entry, leaves in slot.items():
                flat |= {f"slots/{name}/{entry}/{path}": leaf for path, leaf in leaves.items()}
        return flat

    def adopt(self, params, grads, state):
        """Goes on from biofunc's own numbers, so that each step is compared by itself."""
        self.params = {path: self.array(leaf) for path, leaf in params.items()}
        self.grads = {path: self.array(leaf) for path, leaf in grads.items()}
        self.key, self.step = pair_of(state.key), int(state.step)
        for field in ("plasticity", "polarity", "activity"):
            setattr(self, field, {path: self.array(leaf) for path, leaf in getattr(state, field).items()})
        for name, slot in state.slots.items():
            for entry, leaves in slot.items():
                for path, leaf in leaves.items():
                    self.slots[name][entry][path] = leaf.numpy() if leaf.dtype == torch.int64 else self.array(leaf)


ACCEPTS = {
    "crystallize": ("dampening_factor",),
    "volume_dependent_lr": ("stability_factor",),
    "rejuvenate_weights": ("dre",),
    "rejuvenate_weights_lognormal": ("dre",),
    "temporal_learning_rates": ("decay",),
    "synaptic_scaling": ("decay",),
    "sgd": ("weight_decay",),
    "adam": ("weight_decay",),
    "adamw": ("weight_decay",),
    "descend": ("lr",),
}
"""Hyperparameters that the machine changes at a step, by kind of rule."""
