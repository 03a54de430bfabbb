"""What `attach` makes: rules that act at each step of an optimizer, with their state.

The rules are the pure ones; this file alone writes into parameters, in place and at the very end of a step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn, optim

from biofunc import torch_memory
from biofunc.attachment_state import restored
from biofunc.rule import Rule, compute_dtype
from biofunc.running import Flat, check_signals, given_to, on_present
from biofunc.sharding import aligned, local
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["Attachment"]


@dataclasses.dataclass
class Step:
    """What one step of the optimizer has to know when it ends."""

    params: Leaves
    before: Leaves
    state: BioState
    raw: Leaves = dataclasses.field(default_factory=dict)


class Attachment:
    """Rules that act at each step of a torch.optim optimizer; made by `attach`.

    An error in a rule leaves parameters, gradients and state as they were before the step; when it comes from an update
    or weight rule, or from a later evaluation of a closure, the optimizer's own memory has moved on.

    Attributes:
        state: the BioState, replaced at each step.
        rules: the rules under "gradient", "update" and "weight".
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        params: dict[str, nn.Parameter],
        rules: dict[str, tuple[Rule, ...]],
        state: BioState,
        others: dict[int, str],
    ) -> None:
        self.rules = rules
        self.state = state
        self._params = params
        self._others = others
        self._signals: dict[str, Any] = {}
        self._step: Step | None = None
        self._aged: set[str] = set()
        self._attached = True
        self._groups = len(optimizer.param_groups)
        self._redraws = any(rule.redraws for rule in rules["weight"])
        # The optimizer holds the hooks and thereby this object, which does not hold the optimizer: no cycle keeps both
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def signal(self, **signals: Any) -> None:
        """Hands signals to the rules of the coming step of the optimizer, which forgets them when it ends.

        A step that `GradScaler` leaves out is none: the signals wait for the next one.

        Args:
            signals: by name, `activity=activity`, or a hyperparameter for this step; each rule gets those that its
                signature declares. `**{"rule.keyword": value}` is for that rule alone.

        Raises:
            TypeError, ValueError: no rule takes a signal of this name at a step, or a number is out of its range.
            RuntimeError: the rules are detached.
        """
        if not self._attached:
            raise RuntimeError("the rules are detached, so that no step would take the signals; attach them again")
        rules = [rule for group in self.rules.values() for rule in group]
        check_signals(rules, signals, "attached rule")
        for rule in rules:
            for name, value in given_to(rule, signals).items():
                rule.check_value(name, value)
        self._signals.update(signals)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside those of model and optimizer.

        Returns:
            The state, the names of the rules, and by path whether the synapses of a parameter may differ in age;
            `torch.load(…, weights_only=True)` reads it after `import biofunc`.
        """
        aged = {path: path in self._aged for path in self._params}
        return {"state": self.state, "rules": self._names(), "aged": aged}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; model and optimizer load theirs by themselves.

        Args:
            state_dict: what `state_dict` gave, of the same rules on a model of the same parameters.

        Raises:
            KeyError, TypeError, ValueError: it was made for other rules or another model; nothing is changed then.
        """
        self.state, self._aged = restored(state_dict, self.state, self._names())

    def detach(self) -> None:
        """Takes the rules off the optimizer, which goes on by itself; the parameters stay as they are."""
        self._attached = False
        for handle in self._handles:
            handle.remove()

    def __repr__(self) -> str:
        groups = [f"    {place}={list(rules)!r}," for place, rules in self.rules.items() if rules]
        return "\n".join(["attach(", *groups, ")"])

    def _names(self) -> dict[str, list[str]]:
        return {place: [rule.name for rule in rules] for place, rules in self.rules.items()}

    @torch.no_grad()
    def _before_step(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._step is not None:  # the last step failed
            self._restore_gradients(self._step)
            self._step = None
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):  # a fused optimizer skips this step, and so do the rules
            return None
        self._check_groups(optimizer)
        for rule in [rule for group in self.rules.values() for rule in group]:
            rule.check_needs(given_to(rule, self._signals), "attachment.signal({0}={0})")
        params = {path: p.detach() for path, p in self._params.items()}
        before = params
        if self.rules["update"] or self.rules["weight"]:
            before = {path: p.clone() for path, p in params.items()}
        step = Step(params, before, self.state)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._shape_gradients(optimizer, step)
            self._step = step
            return None
        self._step = step
        kwargs = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], self._shaped(optimizer, step, closure), *args[2:]), kwargs

    def _shaped(self, optimizer: optim.Optimizer, step: Step, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, whose gradients pass through the gradient rules.

        All evaluations of a step see the rules as they stand when it begins, with the same noise: a line search needs
        one function. What the first evaluation makes of the state is kept.
        """

        def evaluate() -> Any:
            value = closure()
            with torch.no_grad():
                self._shape_gradients(optimizer, step)
            return value

        return evaluate

    def _shape_gradients(self, optimizer: optim.Optimizer, step: Step) -> None:
        raw = {path: p.grad for path, p in self._params.items() if p.grad is not None}
        for path, grad in raw.items():
            if grad.layout != torch.strided:
                raise TypeError(f"the gradient of '{path}' is sparse; biofunc acts on dense ones, use sparse=False")
        scale = getattr(optimizer, "grad_scale", None)
        grads = {path: aligned("gradient", path, grad.detach(), step.params[path]) for path, grad in raw.items()}
        if scale is not None:
            grads = {path: grad / scale for path, grad in grads.items()}
        _, shaped, state = self._run("gradient", step.params, grads, self.state)
        first = not step.raw
        step.raw = raw
        if first:
            step.state = state
        if scale is not None:  # what a fused optimizer would do by itself
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        for path, grad in shaped.items():
            if grad is not raw[path]:
                self._params[path].grad = grad

    @torch.no_grad()
    def _after_step(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        self._restore_gradients(step)
        try:
            new, state = self._moved(optimizer, step)
        except BaseException:
            self._signals = {}
            for path, p in step.params.items():
                p.copy_(step.before[path])
            raise
        for path, p in step.params.items():
            if new[path] is not p:
                p.copy_(new[path])
        old_born = self.state.slots.get(torch_memory.SLOT, {}).get("born", {})
        new_born = state.slots.get(torch_memory.SLOT, {}).get("born", {})
        self._aged |= {path for path, born in new_born.items() if born is not old_born[path]}
        self.state = state.replace(step=state.step + 1)
        self._signals = {}

    def _restore_gradients(self, step: Step) -> None:
        """`.grad` is what backward left there, so that nothing compounds."""
        for path, grad in step.raw.items():
            self._params[path].grad = grad

    def _check_groups(self, optimizer: optim.Optimizer) -> None:
        if len(optimizer.param_groups) == self._groups:
            return
        for group in optimizer.param_groups[self._groups :]:
            for p in group["params"]:
                if id(p) in self._others:
                    raise ValueError(
                        f"parameter '{self._others[id(p)]}' came to the optimizer after the rules, which do not know "
                        "it; detach() and attach again, or attach when all parameters are there"
                    )
        self._groups = len(optimizer.param_groups)

    def _moved(self, optimizer: optim.Optimizer, step: Step) -> tuple[Leaves, BioState]:
        """Parameters and state after the update and weight rules."""
        params, before, state = step.params, step.before, step.state
        new = dict(params)
        if self.rules["update"] or self.rules["weight"]:
            updates = self._updates(optimizer, step)
            _, shaped, state = self._run("update", before, updates, state)
            for path in shaped:
                if shaped[path] is not updates[path] or path in self._aged:
                    new[path] = (before[path].to(shaped[path].dtype) - shaped[path]).to(params[path].dtype)
            shown = torch_memory.expose(optimizer, self._params, state) if self._redraws else state
            moved, _, renewed = self._run("weight", new, shaped, shown)
            new.update(moved)
            state = torch_memory.take_back(optimizer, self._params, shown, renewed, state) if self._redraws else renewed
        return new, state

    def _updates(self, optimizer: optim.Optimizer, step: Step) -> Leaves:
        """How far the optimizer moved each parameter that had a gradient, as a direction of descent."""
        born = step.state.slots.get(torch_memory.SLOT, {}).get("born", {})
        groups = torch_memory.groups_of(optimizer, self._params)
        updates = {}
        for path in step.raw:
            before, after = step.before[path], step.params[path]
            if path in self._aged and path in groups and optimizer.state.get(self._params[path]):
                memory = optimizer.state[self._params[path]]
                updates[path] = torch_memory.adam_update(groups[path], memory, before, born[path])
            else:
                dtype = compute_dtype(before)
                updates[path] = before.to(dtype) - after.to(dtype)
        return updates

    def _run(self, place: str, params: Leaves, grads: Leaves, state: BioState) -> Flat:
        """Runs the rules of one place on the parameters that have a gradient; all else comes back as it was."""
        new_params, new_grads, new = on_present(self.rules[place], params, grads, state, self._signals)
        # What lives on in parameters and in .grad is written into by others
        live = {_storage(leaf) for leaf in [*self._params.values(), *grads.values(), *new_grads.values()]}
        new = torch_pytree.tree_map(lambda leaf: leaf.clone() if leaf.numel() and _storage(leaf) in live else leaf, new)
        return new_params, new_grads, new


def _storage(leaf: Tensor) -> int:
    return local(leaf).untyped_storage().data_ptr()
