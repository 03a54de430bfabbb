"""Weight splitting: a connection is made of several contacts.

Two cortical neurons that are connected touch each other at several places. With Gamma contacts, Gamma consecutive
outputs of a layer are the contacts of one neuron: they are summed, and the sum is given to all of them, so that no
shape changes:

    y = phi(W x + b);    z[j Gamma ... (j+1) Gamma - 1] = sum of y over the group j

With phi the identity this is a network that is Gamma times narrower and learns faster under plain SGD (Gamma to Gamma^2
times); compare it with such a network before crediting the contacts.
"""

import copy
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from biofunc.sharding import check_module

__all__ = ["split_synapses"]

Module = TypeVar("Module", bound=nn.Module)
SPLITTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Split(nn.Module):
    """A layer whose outputs are contacts, summed in groups; mixed into the class of the layer that it becomes.

    A class of its own, not a forward hook: `torch.compile` does not guard hooks, and would run a split model with the
    code that it compiled for the plain one.
    """

    gamma: int
    feature_dim: int
    activation: Callable[[Tensor], Tensor] | None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        y = y if self.activation is None else self.activation(y)
        dim = y.dim() + self.feature_dim
        groups = y.reshape(*y.shape[:dim], y.shape[dim] // self.gamma, self.gamma, *y.shape[dim + 1 :])
        return groups.sum(dim + 1, keepdim=True).expand(groups.shape).flatten(dim, dim + 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_split, (type(self).__mro__[2],), self.__dict__


_SPLIT_CLASSES: dict[type[nn.Module], type[Split]] = {}


def _split_class(layer: type[nn.Module]) -> type[Split]:
    if layer not in _SPLIT_CLASSES:
        _SPLIT_CLASSES[layer] = type(f"Split{layer.__name__}", (Split, layer), {"__module__": __name__})
    return _SPLIT_CLASSES[layer]


def _empty_split(layer: type[nn.Module]) -> Split:
    """What copying and unpickling start from: a split class is made, not imported."""
    split = _split_class(layer)
    return split.__new__(split)


def _no_fast_path(layer: nn.Module, inputs: object, output: object) -> None:
    """A hook that does nothing: in eval mode, TransformerEncoderLayer goes past the forward of layers without one."""


def split_synapses(
    model: Module,
    gamma: int = 2,
    *,
    activation: Callable[[Tensor], Tensor] | None = None,
    skip: str | Sequence[str] | None = "last",
) -> Module:
    """Makes a copy of a model in which each neuron receives its input through several contacts.

        z[j gamma ... (j+1) gamma - 1] = sum over the group j of activation(W x + b)

    The copy has the same parameter names and shapes: use it with `functional_call` and any parameters of the model.
    Linear layers with inputs of any rank and Conv1d, Conv2d and Conv3d are split.

    Args:
        model: the module; it stays as it is.
        gamma: contacts per connection, at least 1, a divisor of the number of outputs of each split layer; 1 turns the
            mechanism off (with the identity as activation).
        activation: applied to each contact before they are summed; default: the identity.
        skip: "last": all but the last synaptic layer in the order of `modules()`, whose outputs are the model's; or
            globs on layer names ("head", "decoder.*"); None: split all.

    Returns:
        The new module; it can be copied, pickled, vmapped and compiled.

    Raises:
        ValueError: gamma is below 1 or does not divide a layer's outputs, no layer is left to split, a glob matches
            nothing, or the model is split already.
        TypeError: gamma is not an integer, activation not a function, model not a module or wrapped by FSDP, or a layer
            is never called by the module that owns it.

    Source: Hofmann, Becker, Tetzlaff, Mäder 2025, doi 10.1038/s41467-025-60078-9; the biology: Fauth, Wörgötter,
    Tetzlaff 2015, doi 10.1371/journal.pcbi.1004031.

    Differs: the number of outputs, not of inputs, must be divisible; the last layer is found at any depth.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; split_synapses takes an nn.Module")
    check_module("split_synapses", model)
    if activation is not None and (isinstance(activation, type) or not callable(activation)):
        raise TypeError(f"activation is {activation!r}; give a function of a tensor, torch.relu or torch.nn.ReLU()")
    if skip is not None and not isinstance(skip, Sequence):
        raise TypeError(f"skip is {skip!r}; give 'last', globs on names of layers, or None")
    if isinstance(gamma, bool) or not isinstance(gamma, int):
        raise TypeError(f"gamma is {gamma!r}; the number of contacts is an integer")
    if gamma < 1:
        raise ValueError(f"gamma is {gamma}; a connection has at least 1 contact")
    split = copy.deepcopy(model)
    layers = {name: module for name, module in split.named_modules() if isinstance(module, SPLITTABLE)}
    for name in skipped(list(layers), skip):
        del layers[name]
    _check_called(split, layers)
    if not layers:
        raise ValueError(f"no layer is left to split: the model has no Linear or Conv layer beyond skip={skip!r}")
    for name, layer in layers.items():
        if is_lazy(layer.weight):  # it would become a plain layer at its first call
            raise ValueError(f"layer '{name}' has no shape yet; run the model once before it is split")
        features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if features % gamma:
            raise ValueError(
                f"gamma is {gamma} and does not divide the {features} outputs of layer '{name}'; name it in skip=[…]"
            )
        if isinstance(layer, Split):
            raise ValueError(f"layer '{name}' is split already; split the original model")
    if gamma == 1 and activation is None:
        return split
    for module in split.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = (
                False  # layers that have hooks cannot take the nested tensors it makes in eval mode
            )
    for layer in layers.values():
        spatial_dims = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        becoming: Any = layer
        becoming.__class__ = _split_class(type(layer))
        becoming.gamma, becoming.feature_dim, becoming.activation = gamma, -1 - spatial_dims, activation
        layer.register_forward_hook(_no_fast_path)
    return split


def skipped(names: list[str], skip: str | Sequence[str] | None) -> list[str]:
    """Names of the layers that `skip` spares; raises a ValueError for a glob that matches nothing."""
    if skip is None:
        return []
    if skip == "last":
        return names[-1:]
    globs = [skip] if isinstance(skip, str) else skip
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise ValueError(f"skip names '{glob}', which matches no layer; the layers are: {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def _check_called(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """MultiheadAttention multiplies by its projection's weight without calling it: a split would be silently off."""
    for attention in model.modules():
        if isinstance(attention, nn.MultiheadAttention):
            for name, layer in layers.items():
                if layer is attention.out_proj:
                    raise TypeError(
                        f"layer '{name}' belongs to a MultiheadAttention, which never calls it: a split would have no "
                        "effect; leave it out with skip=['*out_proj', …], which replaces skip='last'"
                    )
