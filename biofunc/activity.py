"""Activity: what each neuron of a model puts out, seen while the loss is computed.

Homeostasis and activity-dependent plasticity ask how active a postsynaptic neuron is. A layer's output feature i is
the neuron whose incoming synapses are row i of the layer's weight; its activity is the mean over all that the layer
saw, batch, positions and space alike:

    a_i = mean of measure(y_i),    y = output of the layer

A model is recorded in a copy with forward hooks, so that one forward pass gives both the loss and the activity.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from biofunc.rule import compute_dtype
from biofunc.sharding import check_module, per_neuron
from biofunc.trees import Leaves
from biofunc.wrappers import unwrapped

__all__ = ["record_activity"]

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Tape:
    """What the layers have put out since the forward pass began; None outside of one, when nothing is recorded."""

    def __init__(self) -> None:
        self.uses: dict[str, list[Tensor]] | None = None
        self.measure: Callable[[Tensor], Tensor] = torch.relu


@dataclasses.dataclass(frozen=True)
class Electrode:
    """Writes the activity of a layer's neurons on the tape; a forward hook of its layer."""

    path: str
    feature_dim: int
    tape: Tape

    def __call__(self, layer: nn.Module, inputs: object, output: Tensor) -> None:
        if self.tape.uses is None:
            return
        y = output.detach().to(compute_dtype(output))
        a = self.tape.measure(y)
        if not isinstance(a, Tensor) or a.shape != y.shape:
            shown = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise ValueError(f"measure gives {shown} for the output {tuple(y.shape)} of '{self.path}'; keep the shape")
        others = [dim for dim in range(y.dim()) if dim != y.dim() + self.feature_dim]
        self.tape.uses.setdefault(self.path, []).append((a.mean(others) if others else a).detach())


@dataclasses.dataclass(frozen=True, repr=False)
class Recorder:
    """The pure function that `record_activity` makes.

    Attributes:
        model: the copy that is run, in the mode (train or eval) that the model had.
        paths: paths of the recorded weights, in the order of `named_parameters`.
        tape: where the copy's hooks write during a call.
        measure: activity of an output. Each call hands it to the tape, because `torch.compile` does not guard hooks and
            would run one recorder with what it compiled for another.
    """

    model: nn.Module
    paths: tuple[str, ...]
    tape: Tape
    measure: Callable[[Tensor], Tensor]

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Any, **kwargs: Any
    ) -> tuple[Any, Leaves]:
        """Runs the model.

        Args:
            params: parameters by name.
            buffers: buffers by name; {} for a model without.
            x: its positional input.
            kwargs: its keywords.

        Returns:
            What the model returns, and the activity by path: `(features,)`, detached, float32 or float64.
        """
        # A buffer that was not given would keep what this call writes into it (batch statistics)
        own = {name: leaf.clone() for name, leaf in self.model.named_buffers() if name not in buffers}
        self.tape.uses, self.tape.measure = {}, self.measure
        try:
            y = functional_call(self.model, {**own, **buffers, **params}, (x,), kwargs)
            uses = self.tape.uses
        finally:
            self.tape.uses = None
        return y, {path: torch.stack(uses[path]).mean(0) for path in self.paths if path in uses}

    def __repr__(self) -> str:
        return f"record_activity({type(self.model).__name__}: {', '.join(self.paths)})"


def observed(rule: str, activity: Any, path: str, w: Tensor) -> Tensor:
    """The activity of a weight's postsynaptic neurons out of what a rule was handed; raises if it is not there."""
    if not isinstance(activity, Mapping):
        raise TypeError(
            f"{rule}: activity is {type(activity).__name__}; hand over a dict by path at each step; "
            "bf.record_activity(model) records it"
        )
    if path not in activity:
        raise KeyError(
            f"{rule}: activity has no leaf '{path}', only: {', '.join(activity) or '(none)'}; record it "
            "(bf.record_activity does for Linear and Conv layers), or leave it out with bf.where(selection, rule)"
        )
    a = activity[path]
    if not isinstance(a, Tensor):
        raise TypeError(
            f"{rule}: activity leaf '{path}' is {type(a).__name__}; it must be a tensor, one value per neuron"
        )
    if a.is_complex():
        raise TypeError(f"{rule}: activity leaf '{path}' has dtype {a.dtype}; it must be real")
    if a.shape != w.shape[:1]:
        raise ValueError(
            f"{rule}: activity leaf '{path}' has shape {tuple(a.shape)}, its neurons (axis 0 of the weight) "
            f"{tuple(w.shape[:1])}"
        )
    return per_neuron(a.to(w.dtype), w)


def record_activity(model: nn.Module, *, measure: Callable[[Tensor], Tensor] = torch.relu) -> Recorder:
    """Makes a pure function that runs a model and tells how active each of its neurons was.

        a_i = mean over batch, positions and space of measure(y_i),    y = output of the layer

    `record = record_activity(model)`; then, in a loss, `y, activity = record(params, buffers, x)`, the loss is returned
    with the activity, and `grad(loss, has_aux=True)` gives both. Linear layers with inputs of any rank and Conv1d,
    Conv2d and Conv3d, batched or not, are recorded; a layer of `split_synapses` after its contacts are summed.

    Args:
        model: the module; it stays as it is, and later changes of it (its mode, too) do not reach the function.
        measure: activity of an output, elementwise; default: its positive part, the rate of a ReLU neuron. `torch.abs`
            suits tanh, the identity a layer that spikes.

    Returns:
        A function `(params, buffers, x, **kwargs) -> (y, activity)` that can be differentiated, vmapped, compiled,
        copied and pickled. `activity` is `{path: tensor (features,)}`, by path of the layer's weight in
        `named_parameters`; no gradient flows through it. A layer that is used several times, or whose weight is tied
        to that of others (the first name counts), has the mean over its uses. A layer that the model does not call is
        missing, as the out_proj of MultiheadAttention is always.

    Raises:
        TypeError: model is not a module or wrapped by FSDP, or measure not a function.
        ValueError: the model has no Linear or Conv layer; in a call: measure changes a shape.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; record_activity takes an nn.Module")
    if isinstance(measure, type) or not callable(measure):
        raise TypeError(f"measure is {measure!r}; give a function of a tensor, torch.relu or torch.nn.ReLU()")
    check_module("record_activity", model)
    recorded, tape = copy.deepcopy(unwrapped(model)), Tape()
    names = {id(parameter): name for name, parameter in recorded.named_parameters()}
    paths = set()
    for module in recorded.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # layers that have hooks cannot take the nested tensors of eval mode
        path = names.get(id(module._parameters.get("weight")))
        if isinstance(module, _KINDS) and path is not None:
            spatial_dims = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
            module.register_forward_hook(Electrode(path, -1 - spatial_dims, tape))
            paths.add(path)
    if not paths:
        raise ValueError("the model has no Linear or Conv layer whose weight is a parameter; nothing can be recorded")
    return Recorder(recorded, tuple([name for name in names.values() if name in paths]), tape, measure)
