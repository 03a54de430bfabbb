"""What a learning run remembers about its synapses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from biofunc import trees
from biofunc.trees import Leaves

Slots = dict[str, dict[str, Leaves]]
Fresh = tuple[tuple[str, str, float], ...]
Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True, repr=False)
class BioState:
    """State of a chain, or of rules called one by one: tensors only, none of them ever changed in place.

    All structure exists from `init` on, so that a compiled step is compiled once. The class is a pytree node: it
    passes through `vmap`, `grad` and `torch.compile`, and through optree with `namespace="biofunc"`.

    Attributes:
        key: int64 `(2,)`, the key of all noise.
        step: int64 0-d, the number of chain calls so far.
        plasticity: by path, the learning-rate factor of each synapse: 0-d 1 while all are equal, else shaped like
            the weight. A leaf without an entry is not a synapse: mechanisms leave it alone.
        polarity: by path, the sign of each presynaptic neuron (+1 excitatory, -1 inhibitory).
        activity: by path, the running mean activity of each postsynaptic neuron.
        slots: by rule name, what else a rule keeps: `{entry: {path: tensor}}`.
        fresh: static; the value to which a re-drawn synapse returns, by slot and entry.
        layout: static; path and shape of every leaf of the parameters it was made for.
    """

    key: Tensor
    step: Tensor
    plasticity: Leaves = dataclasses.field(default_factory=dict)
    polarity: Leaves = dataclasses.field(default_factory=dict)
    activity: Leaves = dataclasses.field(default_factory=dict)
    slots: Slots = dataclasses.field(default_factory=dict)
    fresh: Fresh = ()
    layout: Layout = ()

    def replace(self, **fields: Any) -> "BioState":
        """A copy with other values in the named fields.

        Args:
            fields: new values by field name.

        Returns:
            The new state; this one stays as it is.

        Raises:
            TypeError: a name is not a field.
        """
        return dataclasses.replace(self, **fields)

    def with_slot(self, name: str, **entries: Leaves) -> "BioState":
        """A copy in which a rule's slot holds new tensors; entries and paths not given stay.

        Args:
            name: the name under which the rule runs.
            entries: new tensors by path, per entry of the slot.

        Returns:
            The new state.

        Raises:
            TypeError: an entry is no dict of tensors by path.
        """
        for entry, leaves in entries.items():
            if not isinstance(leaves, Mapping):
                raise TypeError(
                    f"with_slot: {entry} is {type(leaves).__name__}; give a dict {{path: tensor}}, "
                    f"{entry}={{path: … for path in params}}"
                )
        slot = self.slots.get(name, {})
        merged = {**slot, **{entry: {**slot.get(entry, {}), **leaves} for entry, leaves in entries.items()}}
        return self.replace(slots={**self.slots, name: merged})

    def innate(self, path: str) -> Tensor | None:
        """The learning-rate factor with which the synapses of a leaf were born; None stands for 1.

        Args:
            path: path of the leaf.

        Returns:
            Tensor shaped like the weight, the product of what the rules' slots hold as "innate", or None.
        """
        rate = None
        for slot in self.slots.values():
            if path in slot.get("innate", {}):
                rate = slot["innate"][path] if rate is None else rate * slot["innate"][path]
        return rate

    def restart(self, redrawn: Mapping[str, Tensor]) -> "BioState":
        """Makes re-drawn synapses new: innate rate, zero moments, zero age; all other synapses stay.

        Call it in a rule that puts new weights in the place of old ones.

        Args:
            redrawn: bool tensors by path, shaped like the weights; True where a weight is new.

        Returns:
            The new state. Every entry of a slot returns to the fresh value that its rule declares.

        Raises:
            ValueError: a rule keeps one value for a whole leaf, because the state was made without the re-drawing rule.
        """
        plasticity = dict(self.plasticity)
        for path, mask in redrawn.items():
            if path in plasticity and plasticity[path].shape == mask.shape:
                innate = self.innate(path)
                plasticity[path] = torch.where(mask, 1.0 if innate is None else innate, plasticity[path])
        state = self.replace(plasticity=plasticity)
        for name, entry, value in self.fresh:
            kept = self.slots[name].get(entry, {})
            renewed = {path: torch.where(mask, value, kept[path]) for path, mask in redrawn.items() if path in kept}
            for path, leaf in renewed.items():
                if leaf.shape != kept[path].shape:
                    raise ValueError(
                        f"{name} keeps one '{entry}' for all synapses of '{path}'; hand the rule that re-draws them to "
                        "bf.init too, so that each keeps its own"
                    )
            state = state.with_slot(name, **{entry: renewed})
        return state

    def __repr__(self) -> str:
        lines = [f"  key={_shape(self.key)}, step={_shape(self.step)},"]
        for field in ("plasticity", "polarity", "activity"):
            lines += _describe(field, getattr(self, field), "  ")
        lines.append("  slots={" if self.slots else "  slots={},")
        for name, slot in self.slots.items():
            lines.append(f"    {name}:" + ("" if slot else " {}"))
            for entry, leaves in slot.items():
                lines += _describe(entry, leaves, "      ")
        if self.slots:
            lines.append("  },")
        return "\n".join(["BioState(", *lines, ")"])


def _shape(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.shape))}]"


def _describe(name: str, leaves: Leaves, indent: str) -> list[str]:
    return [f"{indent}{name}={{{', '.join(f'{path}: {_shape(leaf)}' for path, leaf in leaves.items())}}},"]


DATA = ("key", "step", "plasticity", "polarity", "activity", "slots")


def _children(state: BioState) -> tuple[Any, ...]:
    return tuple([getattr(state, name) for name in DATA])


def _static(state: BioState) -> tuple[Fresh, Layout]:
    return state.fresh, state.layout


def _rebuild(values: Any, static: Any) -> BioState:
    return BioState(**dict(zip(DATA, values, strict=True)), fresh=static[0], layout=static[1])


def _as_tuples(value: Any) -> Any:
    return tuple([_as_tuples(item) for item in value]) if isinstance(value, list) else value


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


torch_pytree.register_pytree_node(
    BioState,
    lambda state: (list(_children(state)), _static(state)),
    _rebuild,
    serialized_type_name="biofunc.BioState",
    flatten_with_keys_fn=lambda state: (
        [(torch_pytree.GetAttrKey(name), getattr(state, name)) for name in DATA],
        _static(state),
    ),
    to_dumpable_context=_as_lists,
    from_dumpable_context=_as_tuples,
)
trees.register(BioState, _children, _static, _rebuild, DATA)
torch.serialization.add_safe_globals([BioState])
