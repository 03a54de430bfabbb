"""Goes on from a checkpoint of an attachment: the state that it holds, if it was made by such rules on such a model."""

from collections.abc import Mapping
from typing import Any

from biofunc import trees
from biofunc.sharding import placed
from biofunc.state import BioState


def restored(
    state_dict: Mapping[str, Any], state: BioState, names: Mapping[str, list[str]]
) -> tuple[BioState, set[str]]:
    """The state of a checkpoint on the devices, in the dtypes and with the placements of the present one.

    Args:
        state_dict: what `Attachment.state_dict` gave.
        state: the present state.
        names: names of the attached rules by their place.

    Returns:
        The state, and the paths of parameters whose synapses may differ in age.

    Raises:
        KeyError, TypeError, ValueError: it was made for other rules or another model.
    """
    for name in ("state", "rules", "aged"):
        if not isinstance(state_dict, Mapping) or name not in state_dict:
            raise KeyError(f"state_dict has no '{name}'; give what Attachment.state_dict() returned")
    given = state_dict["state"]
    if not isinstance(given, BioState):
        raise TypeError(f"state_dict['state'] is {type(given).__name__}, not a BioState")
    if not isinstance(state_dict["aged"], Mapping):
        raise TypeError(f"state_dict['aged'] is {type(state_dict['aged']).__name__}, not a dict of paths")
    if state_dict["rules"] != names:
        raise ValueError(f"state_dict was made by the rules {state_dict['rules']}, attached are {names}")
    if given.layout != state.layout:
        difference = sorted(set(given.layout) ^ set(state.layout)) or [given.layout[0]]
        raise ValueError(f"state_dict was made for other parameters; they differ first at {difference[0]}")
    old, new = trees.flatten(state)[0], trees.flatten(given)[0]
    for path in sorted(old.keys() ^ new.keys()):
        where = "state_dict lacks" if path in old else "what is attached does not keep"
        raise KeyError(
            f"{where} '{path}'; attach the rules with the options they had, to the same kind of optimizer"
        )
    for path, leaf in old.items():
        if new[path].shape != leaf.shape:
            shapes = f"{tuple(new[path].shape)}, here {tuple(leaf.shape)}"
            raise ValueError(f"state_dict leaf '{path}' has shape {shapes}")
    structure = trees.flatten(given)[1]
    there = {path: placed(leaf.to(old[path].device, old[path].dtype), old[path]) for path, leaf in new.items()}
    return trees.unflatten(structure, there), {path for path, aged in state_dict["aged"].items() if aged}
