"""The one-line converter of pytorch_bio_transformations, as pure functions."""

import copy
import dataclasses
import difflib
import functools
import glob
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from biofunc.chain import Chain, init
from biofunc.config import BioConfig, check_settings
from biofunc.config_chain import called_layers, chain_of, dale_axes
from biofunc.dale import impose_dales_principle
from biofunc.keys import key as make_key
from biofunc.rule import Hyperparameter
from biofunc.selection import Selection, layers, select_paths
from biofunc.sgd import sgd
from biofunc.sharding import check_module
from biofunc.splitting import SPLITTABLE, skipped, split_synapses
from biofunc.state import BioState
from biofunc.trees import Leaves, zero_of
from biofunc.wrappers import unwrapped

__all__ = ["Converted", "convert"]


@dataclasses.dataclass(frozen=True, repr=False)
class Converted:
    """A model as pure functions; made by `convert`.

    Attributes:
        model: the copy that is run, split if asked for, in the mode that the model had; `model.eval()` switches.
        params: parameters by name, detached. Frozen ones (`requires_grad=False`) are not among them: they stay in
            `model`.
        buffers: buffers by name.
        state: the BioState with which learning starts.
        learn: the chain: `params, _, state = learn(params, grads, state)`.
        config: the settings.
        where: which parameters are synapses.
    """

    model: nn.Module
    params: Leaves
    buffers: Leaves
    state: BioState
    learn: Chain
    config: BioConfig
    where: Selection

    def apply(self, params: Mapping[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        """Runs the model with the buffers of the conversion; running statistics are not updated.

        Args:
            params: parameters by name.
            inputs: its positional inputs.
            keywords: its keywords.

        Returns:
            What the model returns.

        Raises:
            KeyError: other parameters than those of the conversion.
        """
        return self.apply_and_update(params, self.buffers, *inputs, **keywords)[0]

    def apply_and_update(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *inputs: Any, **keywords: Any
    ) -> tuple[Any, Leaves]:
        """Runs the model and tells what becomes of its buffers, as BatchNorm's running statistics.

        Args:
            params: parameters by name.
            buffers: buffers by name; they stay as they are.
            inputs: its positional inputs.
            keywords: its keywords.

        Returns:
            What the model returns, and the new buffers.

        Raises:
            KeyError: other parameters than those of the conversion.
        """
        self._check_names(params)
        # What the model writes into must be batched under vmap if anything that it may write is
        given = [leaf for leaf in tree_leaves((dict(params), inputs, keywords)) if isinstance(leaf, Tensor)]
        new = {name: buffer + zero_of(given, buffer.device).to(buffer.dtype) for name, buffer in buffers.items()}
        all_given = {**new, **params}
        y = functional_call(self.model, all_given, inputs, keywords)
        return y, {name: all_given[name] for name in new}  # also those that the model assigned

    def init(self, params: Mapping[str, Tensor], key: Tensor) -> tuple[Leaves, BioState]:
        """Starts anew from other parameters, or an ensemble: `torch.vmap(bio.init)(params, keys)`.

        Args:
            params: parameters by name.
            key: from `biofunc.random.key`.

        Returns:
            The parameters, with Dale's principle imposed if it applies, and the state.

        Raises:
            KeyError: other parameters than those of the conversion.
            TypeError, ValueError: a leaf is not floating point, or `key` is no key.
        """
        self._check_names(params)
        return _start(self.model, self.config, self.learn, self.where, dict(params), key)

    def _check_names(self, params: Mapping[str, Tensor]) -> None:
        for name in params:
            if name not in self.params:
                close = difflib.get_close_matches(name, list(self.params), 1)
                hint = f"did you mean '{close[0]}'?" if close else "frozen parameters stay in the model"
                raise KeyError(f"params has '{name}', which is none of the converted parameters; {hint}")
        for name in self.params:
            if name not in params:
                raise KeyError(f"params lacks '{name}'; hand over all parameters of the conversion")

    def __repr__(self) -> str:
        return f"convert({type(self.model).__name__}, {len(self.params)} parameters, learn={self.learn!r})"


def convert(
    model: nn.Module | Callable[..., nn.Module],
    *arguments: Any,
    config: BioConfig | None = None,
    key: Tensor | None = None,
    lr: Hyperparameter = 0.01,
    optimizer: Any = None,
    where: Selection = None,
    **settings: Any,
) -> Converted:
    """Makes pure functions of a model in one line: `bio = bf.convert(model, crystal_thresh=1e-4)`.

    `bio.apply(params, x)` runs it, and `bio.learn(params, grads, state)` learns with every mechanism in its place:

        crystallize, the optimizer, volume_dependent_lr, fuzzy_learning_rates, descend, rejuvenation, Dale's principle

    Args:
        model: a module, which stays as it is; or a class or another function that makes one.
        arguments: positional arguments of the class; `functools.partial` binds its keywords.
        config: settings; default: `BioConfig()`.
        key: from `biofunc.random.key`; default: `key(0)`.
        lr: learning rate, >= 0, as `descend` takes it.
        optimizer: an optimizer rule; default: `sgd()`.
        where: which parameters are synapses, see `Chain.init`; default: the weights of Linear and Conv2d layers.
        settings: those of `BioConfig`, by name; they override `config`.

    Returns:
        Converted: `apply`, `params`, `buffers`, `state`, `learn`; `init` starts ensembles and other parameters. With
        `fuzzy_lr_distribution="activity"`, `learn` needs the signal `activity`; `record_activity(bio.model)` gives it.

    Raises:
        TypeError: a setting that does not exist, with the nearest one that does; what is given makes no module, or one
            that FSDP has wrapped.
        ValueError: the model has no synaptic layer, a value out of its range, a combination that has no meaning, or a
            layer whose outputs cannot be split in `weight_splitting_Gamma`.
        KeyError: `where` is a tree that does not match the parameters.

    Source: pytorch_bio_transformations 0.0.5, `BioConverter`.

    Differs: the model is copied, not changed; the last synaptic layer is found at any depth and not split; a projection
    that MultiheadAttention does not call is not split; each mechanism differs as its rule says.
    """
    check_settings(settings, "config", "key", "lr", "optimizer", "where")
    if not isinstance(config, BioConfig | None):
        raise TypeError(f"config is {type(config).__name__}; give a BioConfig, bf.BioConfig(**config)")
    config = dataclasses.replace(config or BioConfig(), **settings)
    module = _made(model, arguments)
    where = _synapses(module) if where is None else where
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    paths = _selected(where, params, module)
    module = _split(module, config, set(paths))
    learn = chain_of(module, config, paths, lr, sgd() if optimizer is None else optimizer)
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    params, state = _start(module, config, learn, where, params, make_key(0) if key is None else key)
    return Converted(module, params, buffers, state, learn, config, where)


def _made(model: Any, arguments: tuple[Any, ...]) -> nn.Module:
    if isinstance(model, nn.Module):
        if arguments:
            raise TypeError(f"model is a module and takes no arguments, and {len(arguments)} were given")
        made = model
    else:
        if not callable(model):
            raise TypeError(
                f"model is {type(model).__name__}; give an nn.Module, or a class or function that makes one"
            )
        try:
            made = model(*arguments)
        except TypeError as error:
            error.add_note("convert hands on positional arguments; functools.partial(Model, name=…) binds keywords")
            raise
        if not isinstance(made, nn.Module):
            raise TypeError(f"{model!r} made {type(made).__name__}; it must make an nn.Module")
    check_module("convert", made)
    made = copy.deepcopy(unwrapped(made))  # a function may hand out a module that others use
    for name, p in [*made.named_parameters(), *made.named_buffers()]:
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"'{name}' has no shape yet; run the model once before it is converted")
    return made


def _synapses(model: nn.Module) -> Selection:
    try:
        return layers(model, nn.Linear, nn.Conv2d)
    except ValueError as error:
        raise ValueError(f"{error}; name its synapses, where='*.weight'") from None


def _selected(where: Selection, params: Leaves, model: nn.Module) -> list[str]:
    try:
        return select_paths(where, params)
    except ValueError:
        if select_paths(where, dict(model.named_parameters())):
            raise ValueError("all its synapses are frozen (requires_grad=False); let some of them learn") from None
        raise


def _split(model: nn.Module, config: BioConfig, paths: set[str]) -> nn.Module:
    gamma = config.weight_splitting_Gamma
    if gamma <= 1:
        return model
    called = list(called_layers(model, paths))
    spared = skipped(called, config.weight_splitting_skip)
    split = [name for name in called if name not in spared]
    if not split:
        raise ValueError(
            f"weight_splitting_Gamma is {gamma} and no layer is left to split beyond "
            f"weight_splitting_skip={config.weight_splitting_skip!r}"
        )
    others = [name for name, m in model.named_modules() if isinstance(m, SPLITTABLE) and name not in split]
    activation = config.weight_splitting_activation_function
    return split_synapses(model, gamma, activation=activation, skip=[glob.escape(name) for name in others])


def _start(
    model: nn.Module, config: BioConfig, learn: Chain, where: Selection, params: Leaves, key: Tensor
) -> tuple[Leaves, BioState]:
    if not config.apply_dales_principle:
        return params, learn.init(params, key, where=where)
    impose = functools.partial(impose_dales_principle, axis=dale_axes(model))
    state = init(params, key, impose, *learn.rules, where=where)
    params, _, state = impose_dales_principle(params, params, state)
    return params, state
