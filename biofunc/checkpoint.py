"""Checkpoints: a run that was stopped goes on as if it had not been, bit for bit.

A checkpoint is one safetensors file. Beside the tensors its metadata hold the format and its version, the versions of
biofunc and torch, and, as JSON, the layout of the tree and the rules with their hyperparameters. Nothing in it is
executed when it is read.
"""

import json
import os
from typing import Any

import torch
from torch import Tensor

from biofunc import checkpoint_file, trees
from biofunc.checkpoint_layout import DEEPEST, Saved, describe, parse
from biofunc.checkpoint_like import ABSENT, fit, placed
from biofunc.checkpoint_rules import Rules, check_rules, describe_rules, parse_rules
from biofunc.sharding import is_sharded
from biofunc.trees import Leaves, Tree

__all__ = ["load", "save"]

FORMAT = "biofunc.checkpoint"
VERSION = 1


def save(path: str | os.PathLike[str], tree: Tree, rules: Rules | None = None) -> None:
    """Writes a tree into a file that replaces the one before, whole or not at all.

    It is written beside the path under a name that begins with a dot and ends with `.tmp`, flushed to the disk, and
    renamed. A process that is killed meanwhile leaves the last checkpoint as it was, and that file, which the next save
    to the path removes. One process at a time may save to a path: of data-parallel ones, let one save.

    A tree with DTensors is saved by all processes together into a folder, each writing its part, and can be loaded by
    any number of them: each checks all files and reads what it holds.

    What comes back are plain contiguous tensors, or DTensors placed like those of `like`: whether a gradient is
    required, whether memory was shared, and attributes of containers (the versions in the `state_dict` of a module) are
    not kept.

    Args:
        path: the file, or the folder of a tree with DTensors.
        tree: any nesting of dicts with string or integer keys, lists, tuples and BioStates, of ensembles too, that
            holds tensors, numbers, strings and None: `{"params": params, "state": state, "epoch": 3}`, or what
            `state_dict` gives. NamedTuples and nodes registered with optree are saved too; to load them takes `like`.
        rules: the chain, what `attach` returned, or a sequence of rules. Names, periods, selections and bound
            hyperparameters are kept for `load` to compare: tensors by their bits, schedules with their arguments,
            functions of your own by name, with what a `functools.partial` binds, which a closure does not show.

    Raises:
        TypeError, ValueError: something in the tree cannot be saved; nothing was written then.
        RuntimeError: another process that saves a part failed in a way that only words can tell.
        OSError: it could not be written; what was there before is as it was.
        ModuleNotFoundError: safetensors is not installed.
    """

    def described() -> tuple[Leaves, dict[str, str]]:
        checkpoint_file.safetensors()
        tensors: Leaves = {}
        return tensors, _metadata({"tree": describe(tree, "", tensors), "rules": describe_rules(rules)})

    if _is_spread(tree):
        from biofunc import checkpoint_sharded

        checkpoint_sharded.write(os.fspath(path), described)
    else:
        checkpoint_file.write(os.fspath(path), *described())


def _is_spread(tree: Tree) -> bool:
    try:
        return any([is_sharded(leaf) for leaf in trees.leaves(tree)])
    except RecursionError:  # a tree that contains itself: describe says so
        return False


def load(
    path: str | os.PathLike[str],
    like: Tree | None = None,
    rules: Rules | None = None,
    device: torch.device | str | None = None,
) -> Tree:
    """Reads what `save` wrote; nothing in the file is executed.

    Args:
        path: the file or folder.
        like: a tree of the same structure, shapes and dtypes, such as the one that the run starts with; the tensors
            come to its devices and placements, and the keys of dicts into its order. Its values are not used.
        rules: the chain, the attachment or the rules with which the run goes on: they must be those that were saved,
            in name, order, period, selection and bound hyperparameters.
        device: where plain tensors come to; default: to the devices of `like`, else to the CPU.

    Returns:
        The tree.

    Raises:
        ValueError: the file is damaged or none of `save`, of another format version, or does not match `like` or
            `rules`.
        TypeError: `rules` holds something else than rules, or a DTensor of `like` holds partial sums.
        OSError: it is missing or cannot be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    checkpoint_file.safetensors()
    path = os.fspath(path)
    spread = os.path.isdir(path)  # a tree with DTensors
    file = os.path.join(path, "index.safetensors") if spread else path
    while True:
        data = checkpoint_file.read(file)
        try:
            return _loaded(path, data, spread, like, rules, device)
        except (ValueError, OSError):
            # Others may have saved meanwhile, and removed the parts that this index names. Processes that load DTensors
            # together do not go on from two checkpoints: for them it stays an error
            if not spread or _is_spread(like) or checkpoint_file.read(file) == data:
                raise


def _loaded(path: str, data: bytes, spread: bool, like: Tree, rules: Any, device: torch.device | str | None) -> Tree:
    try:
        metadata = checkpoint_file.metadata_of(data)
        check_version(metadata)
    except ValueError as error:
        raise ValueError(f"'{path}' is no checkpoint that can be loaded: {error}") from None
    try:
        tensors = checkpoint_file.tensors_of(data)
        if spread:
            from biofunc import checkpoint_parts

            tensors = checkpoint_parts.shapes(path, metadata)
        tree = _parsed(metadata, tensors)
        saved_rules = parse_rules(metadata.get("rules", ""))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: {error}; go back to a checkpoint that is whole") from None
    if rules is not None:
        check_rules(saved_rules, rules)
    targets: Leaves = {}

    def place(path: str, saved: Saved, leaf: Any) -> Tensor:
        targets[saved.name] = placed(saved.tensor, leaf, device, path)
        return targets[saved.name]

    loaded = fit(tree, ABSENT if like is None else like, place)
    if spread:
        checkpoint_parts.fill(path, metadata, targets)
    return loaded


def _metadata(described: dict[str, Any]) -> dict[str, str]:
    from biofunc import __version__

    texts = {name: json.dumps(part, allow_nan=False, separators=(",", ":")) for name, part in described.items()}
    versions = {"format_version": str(VERSION), "biofunc": __version__, "torch": torch.__version__}
    return {"format": FORMAT, **versions, **texts}


def check_version(metadata: dict[str, str]) -> None:
    """Refuses what is no checkpoint, or one of another version of the format.

    Args:
        metadata: of a file or an index.

    Raises:
        ValueError: as the message says.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"its format is {metadata.get('format')!r}, not '{FORMAT}': bf.save did not write it, or it is damaged"
        )
    if metadata.get("format_version") != str(VERSION):
        raise ValueError(
            f"its format version is {metadata.get('format_version')}, this biofunc reads version {VERSION}; it was "
            f"written by biofunc {metadata.get('biofunc')}, which reads it"
        )


def _parsed(metadata: dict[str, str], tensors: Leaves) -> Any:
    """The tree, with `Saved` for its tensors, out of metadata that nobody vouches for."""
    used: set[str] = set()
    try:
        tree = parse(json.loads(metadata.get("tree", ""), parse_constant=_refuse), tensors, "", used)
    except RecursionError:
        raise ValueError(f"its tree is nested deeper than {DEEPEST}") from None
    except ValueError as error:
        raise ValueError(f"its tree is damaged, {error}") from None
    for name in sorted(tensors.keys() - used):
        raise ValueError(f"the tree has no place for its tensor '{name}'")
    return tree


def _refuse(token: str) -> None:
    raise ValueError(f"{token} is no JSON")
