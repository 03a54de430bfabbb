"""Synaptic scaling: a neuron that is too active weakens all of its inputs, one that is too silent strengthens them.

Cortical neurons hold their mean firing rate over days: deprived of activity they scale all their excitatory synapses
up, driven too hard they scale them down. The factor is common to the synapses of a neuron, so that what learning has
written into their ratios stays. With the running mean a of a neuron's activity x and its target a*:

    a <- a + (1 - decay) / (1 - decay^t) (x - a)        the t-th observation; the mean is x at the first
    w <- w max(1 + rate (a* - a), 1/2)                  linear
    w <- w max(1 + rate (a* - a) |w|, 1/2)              quadratic: the change is (a* - a) w^2, with the sign of w

The quadratic form is the one under which Hebbian plasticity and scaling together have a globally stable fixed point.
Scaling is slower than learning: rate is small and the mean is long. A factor of at least 1/2 cannot flip a sign.
"""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from biofunc.activity import observed
from biofunc.bias_correction import bias_correction
from biofunc.decorator import GIVEN, REQUIRED, rule
from biofunc.reductions import finite_mean
from biofunc.rule import Hyperparameter
from biofunc.sharding import per_neuron
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["synaptic_scaling"]


def _nothing_observed(params: Leaves, state: BioState, *, name: str) -> BioState:
    def zeros(w: Tensor) -> Tensor:  # the step is 0 here, and batched where any input of init is
        zero = state.step.to(w.device, w.dtype)
        return per_neuron(torch.zeros(w.shape[:1], dtype=w.dtype, device=w.device), w) + zero

    state = state.with_slot(name, count={path: zeros(w) for path, w in params.items()})
    return state.replace(activity={**state.activity, **{path: zeros(w) for path, w in params.items()}})


@rule(
    phase="weights",
    ranges={"rate": "[0, 1]", "decay": "[0, 1)"},
    choices={"form": ("linear", "quadratic")},
    init=_nothing_observed,
)
def synaptic_scaling(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    activity: Mapping[str, Tensor] = REQUIRED,
    target: Any = "population",
    rate: Hyperparameter = 1e-3,
    decay: Hyperparameter = 0.99,
    form: str = "linear",
    name: str = GIVEN,
) -> tuple[Leaves, Leaves, BioState]:
    """Scales all synapses of a neuron so that its mean activity comes to a target.

        a <- running mean of the neuron's activity
        w <- w max(1 + rate (target - a), 1/2)           linear
        w <- w max(1 + rate (target - a) |w|, 1/2)       quadratic

    The neuron is the postsynaptic one, axis 0 of the weight. Hand the activity over at each step:
    `learn(params, grads, state, activity=activity)`.

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params; not used.
        state: made with this rule; its `activity`, `(neurons,)` by path, is the running mean and is written.
        activity: a signal: the activity of this step by path, each `(neurons,)`, as `record_activity` gives it
            (detach what you measure yourself: the state keeps it); paths that the rule does not act on are ignored.
        target: activity that a neuron comes to, in its unit: a number, a 0-d tensor or a schedule; a dict by path of
            numbers or tensors, 0-d or `(neurons,)`, where NaN leaves a neuron alone; or "population": the mean running
            activity of the leaf's neurons.
        rate: relative change per call and unit of activity (linear; quadratic: and unit of weight), in [0, 1]; 0: off.
        decay: share of the running mean that is kept per call, in [0, 1); 0: the last observation alone. Within
            `every` the calls count, not the steps.
        form: "linear", or "quadratic": large synapses carry more of the change, so that a neuron whose large synapses
            are inhibitory can be driven the wrong way; it suits weights of one sign.

    Returns:
        The scaled params, grads as given, and the state with the new mean. An observation that is not finite is left
        out: that neuron's mean and weights stay, and it spoils no other's. A neuron that inputs cannot make fire (a
        dead unit) is not woken by a factor: its weights grow for as long as its target is above 0; a target of NaN
        excludes it.

    Raises:
        TypeError: no activity is given, or a value is no number or tensor.
        KeyError: activity or target lacks a leaf, or the state was made without this rule.
        ValueError: a tensor of the wrong shape, or a number out of its range.

    Phase: weights.

    Source: Turrigiano 2008, PMC2834419 (multiplicative scaling). Tetzlaff, Kolodziejski, Timme, Wörgötter 2012, doi
    10.3389/fncom.2012.00036 (slow scaling by target minus activity; the quadratic dependence on the weight, taken from
    a secondary reading of it).

    Differs: discrete steps; scaling acts by itself after the update instead of within one differential equation with
    plasticity; inhibitory (negative) weights scale as excitatory ones do; the factor is at least 1/2.
    """
    if not isinstance(target, str | Tensor | Mapping) and callable(target):
        target = target(state.step)

    def running_mean(a: Tensor, x: Tensor, t: Tensor) -> Tensor:
        share = (1 - decay) / bias_correction(decay, t.clamp(min=1))  # (1 - decay) / (1 - decay^t)
        return torch.where(t > 1, a + share * (x - a), x)

    def scaled(w: Tensor, error: Tensor) -> Tensor:
        change = (rate * error).reshape(error.shape + (1,) * (w.dim() - error.dim()))
        if form == "quadratic":
            change = change * w.abs()
        return w * torch.where(change.isfinite(), torch.clamp(1 + change, min=0.5), 1.0)

    new, mean, count = {}, {}, {}
    for path, w in params.items():
        a, x = state.activity[path], observed(name, activity, path, w)
        seen = x.isfinite()
        count[path] = state.slots[name]["count"][path] + seen
        mean[path] = running_mean(a, torch.where(seen, x, a), count[path])
        error = _goal(target, path, w, mean[path], count[path]) - mean[path]
        new[path] = scaled(w, torch.where(seen, error, 0.0))
    return new, grads, state.replace(activity={**state.activity, **mean}).with_slot(name, count=count)


def _goal(target: Any, path: str, w: Tensor, mean: Tensor, count: Tensor) -> Any:
    """The target of a leaf's neurons; the population is that of the neurons that were ever observed."""
    if isinstance(target, str):
        if target != "population":
            raise ValueError(f"synaptic_scaling: target is {target!r}; give 'population', a number or a dict by path")
        return finite_mean(torch.where(count > 0, mean, torch.nan))
    if isinstance(target, Mapping):
        if path not in target:
            raise KeyError(f"target has no leaf '{path}' that synaptic_scaling acts on; name it, or use bf.where")
        target = target[path]
    if isinstance(target, Tensor):
        return (per_neuron(_checked(target, path, mean.shape), w) if target.dim() else target).to(mean.dtype)
    if isinstance(target, bool) or not isinstance(target, numbers.Real):
        raise TypeError(
            f"synaptic_scaling: target is {target!r}; give a number, a tensor, a dict of them by path, or 'population'"
        )
    if not math.isfinite(target):
        raise ValueError(f"synaptic_scaling: target is {target}; it must be finite")
    return target


def _checked(target: Tensor, path: str, shape: torch.Size) -> Tensor:
    if target.shape != shape:
        raise ValueError(
            f"target leaf '{path}' has shape {tuple(target.shape)}, its neurons (axis 0 of the weight) {tuple(shape)}"
        )
    return target
