"""Noise of a rule: one key per leaf, one draw per rule.

    key of a leaf = fold_in(fold_in(fold_in(state.key, rule name), step or "init"), path)

Nothing else enters, so adding a rule to a chain, a leaf to a tree or a member to an ensemble changes no other
number. Draws have 24 random bits whatever the dtype of the leaf: a float64 run sees the noise of the float32 run.
A process that holds a part of a leaf draws the numbers of that part.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from biofunc import parts, philox
from biofunc.keys import fold_in, fold_in_names
from biofunc.sharding import assembled, part_of
from biofunc.state import BioState
from biofunc.trees import Leaves

_KINDS = ("uniform", "normal", "coin")


class Noise:
    """Draws for the leaves of one rule at one step; handed to a rule that declares the keyword `noise`."""

    def __init__(self, keys: Mapping[str, Tensor]) -> None:
        self._keys: Mapping[str, Tensor] | None = keys

    def keys(self, leaves: Leaves) -> dict[str, Tensor]:
        """One key per leaf, for rules that draw by themselves.

        Args:
            leaves: tensors by path.

        Returns:
            int64 `(2,)` keys by path.

        Raises:
            RuntimeError: the rule has drawn before.
            KeyError: the rule does not act on one of the leaves.
        """
        if self._keys is None:
            raise RuntimeError("this rule has drawn before; a key is used once: ask for all kinds in one noise.draw(…)")
        keys, self._keys = self._keys, None
        return {path: keys[path].to(leaf.device) for path, leaf in leaves.items()}

    def draw(self, leaves: Leaves, *kinds: str) -> list[Leaves]:
        """Draws all the noise that a rule needs in a step.

        Args:
            leaves: tensors by path; a draw has the shape, and a DTensor's placements, of its leaf and is rounded to its
                dtype.
            kinds: "uniform" in [0, 1), "normal" standard normal, or "coin", one 0-d uniform per leaf.

        Returns:
            One dict of draws by path per kind, in the order asked for.

        Raises:
            RuntimeError: the rule has drawn before; a key is used once, so ask for all kinds in one call.
            ValueError: an unknown kind, or none.
            KeyError: the rule does not act on one of the leaves.
            TypeError: a leaf is a DTensor inside `grad` or `vmap` of torch.func.
        """
        for kind in kinds or ("",):
            if kind not in _KINDS:
                raise ValueError(f"'{kind}' is no kind of noise; draw one or more of {', '.join(_KINDS)}")
        keys = self.keys(leaves)
        # Within the stream of a leaf the kinds follow one another, each from a fresh block on.
        starts = dict.fromkeys(leaves, 0)
        held = {path: part_of(leaf) for path, leaf in leaves.items()}
        draws: list[Leaves] = []
        for kind in kinds:
            wanted = dict.fromkeys(leaves, ONE) if kind == "coin" else held
            flat = _drawn(keys, starts, wanted, "normal" if kind == "normal" else "uniform")
            drawn = {path: flat[path].reshape(wanted[path].shape).to(leaf.dtype) for path, leaf in leaves.items()}
            draws.append(drawn if kind == "coin" else {path: assembled(drawn[path], leaves[path]) for path in leaves})
            starts = {path: at - (-(1 if kind == "coin" else leaves[path].numel()) // 4) for path, at in starts.items()}
        return draws


ONE = parts.Part((), 1)


def _drawn(
    keys: Mapping[str, Tensor], starts: Mapping[str, int], wanted: Mapping[str, parts.Part], kind: str
) -> Leaves:
    """Draws of parts of leaves, flat, from some block of their streams on; in one Philox call but for cut rows."""
    runs = {path: part.blocks() for path, part in wanted.items() if part.starts is None}
    drawn = philox.ragged_draws(
        [keys[path] for path in runs],
        [starts[path] + block for path, (block, _, _) in runs.items()],
        [count for _, _, count in runs.values()],
        kind,
    )
    flat = {path: some[lane:] for (path, (_, lane, _)), some in zip(runs.items(), drawn, strict=True)}
    rows = {path: part.shifted(4 * starts[path]) for path, part in wanted.items() if path not in runs}
    return {**flat, **{path: parts.draws(keys[path], part, kind) for path, part in rows.items()}}


class StepKeys:
    """Keys of this step by rule and path; derived for all rules at once, when the first of them draws."""

    def __init__(self, state: BioState, names: Sequence[str], paths: Sequence[str]) -> None:
        self._state = state
        self._names = names
        self._paths = paths
        self._keys: Tensor | None = None

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if self._keys is None:
            keys = fold_in(fold_in_names(self._state.key, self._names), self._state.step)
            self._keys = fold_in_names(keys, self._paths)
        rule = self._names.index(name)
        return {path: self._keys[rule, leaf] for leaf, path in enumerate(self._paths)}


def init_keys(state: BioState, name: str, paths: Sequence[str]) -> dict[str, Tensor]:
    """Keys of a rule's init, by path.

    Args:
        state: whose key they are derived from.
        name: of the rule.
        paths: of its leaves.

    Returns:
        int64 `(2,)` keys by path.
    """
    keys = fold_in_names(fold_in(fold_in(state.key, name), "init"), paths)
    return {path: keys[leaf] for leaf, path in enumerate(paths)}
