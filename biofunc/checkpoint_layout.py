"""Trees as JSON and back: what a checkpoint holds beside the numbers of its tensors.

A tensor becomes its name, dtype and shape, a container its kind and what it holds; numbers, strings and None stand for
themselves. No class is looked up by a name out of a file, so that nothing which a file says is executed.
"""

import dataclasses
import re
import struct
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biofunc import trees
from biofunc.sharding import is_sharded
from biofunc.state import DATA, BioState, Fresh, Layout
from biofunc.trees import Leaves, Tree

Description = Any
"""What `json.dumps` takes and `json.loads` gives."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Dtypes that safetensors keeps bit for bit, with its names for them."""

DEEPEST = 100
LONGEST_INTEGER = 4096
_KINDS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "list": list, "tuple": tuple}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A tensor of a checkpoint: its name in the file, and the values or, on the meta device, dtype and shape alone."""

    name: str
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A node of a class that a file cannot make: a NamedTuple, or one that its owner registered with optree."""

    name: str
    children: dict[str, Any]


def describe(tree: Tree, path: str, tensors: Leaves, depth: int = 0) -> Description:
    """The layout of a tree.

    Args:
        tree: what is saved.
        path: where it stands in the whole, for names and messages.
        tensors: takes up the tensors by name.
        depth: how deep it stands.

    Returns:
        What `json.dumps` takes.

    Raises:
        TypeError: something that a checkpoint cannot hold.
        ValueError: nested too deeply.
    """
    if depth > DEEPEST:
        raise ValueError(f"{at(path[:60] + '…')} is nested deeper than {DEEPEST}; does the tree contain itself?")

    def inner(key: Any, child: Any) -> Description:
        return describe(child, joined(path, key), tensors, depth + 1)

    tree = _plain_number(tree)
    kind = type(tree)
    if isinstance(tree, Tensor):
        check_tensor(tree, path)
        name = _unique(path, tensors)
        tensors[name] = tree
        return {"tensor": name, "dtype": DTYPES[tree.dtype], "shape": list(tree.shape)}
    if kind is int:
        _check_size(tree, path)
    if tree is None or kind in (bool, int, str):
        return tree
    if kind is float:
        finite = tree - tree == 0
        return tree if finite else {"float": struct.pack(">d", tree).hex()}
    if kind in (dict, OrderedDict):
        for key in tree:
            if type(key) is int:
                _check_size(key, path)
            elif type(key) is not str:
                raise TypeError(f"{at(path)} has the key {key!r}; keys of a checkpoint are strings and integers")
        return {kind.__name__: [[key, inner(key, child)] for key, child in tree.items()]}
    if kind in (list, tuple):
        return {kind.__name__: [inner(index, child) for index, child in enumerate(tree)]}
    if kind is BioState:
        static = describe((tree.fresh, tree.layout), path, tensors)
        return {"BioState": {field: inner(field, getattr(tree, field)) for field in DATA}, "static": static}
    node = trees.one_level(tree)
    if node is not None:
        entries, children, _ = node
        items = [[str(entry), inner(entry, child)] for entry, child in zip(entries, children, strict=True)]
        return {"node": name_of(kind), "children": items}
    raise TypeError(
        f"{at(path)} is {kind.__name__}; a checkpoint holds tensors, dicts, lists, tuples, BioStates, nodes that are "
        "registered with optree, and int, float, str, bool and None: convert it to one of them"
    )


def _plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's, without a digit less; all else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and value.dtype.kind in "biuf":
        number = value.item()
        return number if type(number) in (bool, int, float) else value
    return value


def check_tensor(tensor: Tensor, path: str) -> None:
    """Refuses a tensor whose bits a checkpoint would not give back.

    Args:
        tensor: what is to be saved.
        path: where it stands.

    Raises:
        TypeError: the message says what about it, and the remedy.
    """
    problem = None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        problem = "is inside vmap or grad; save outside, where the whole ensemble is one tensor"
    elif type(tensor) not in (Tensor, nn.Parameter) and not is_sharded(tensor):
        problem = f"is a {type(tensor).__name__}; save a plain tensor with its values"
    elif tensor.layout != torch.strided or tensor.is_nested:
        problem = f"has layout {tensor.layout}; save tensor.to_dense(), or its parts"
    elif tensor.device.type == "meta":
        problem = "is on the meta device and has no values"
    elif tensor.dtype not in DTYPES:
        problem = f"has dtype {tensor.dtype}, which does not survive; save torch.view_as_real(…), or cast it"
    if problem:
        raise TypeError(f"{at(path)} {problem}")


def parse(layout: Description, tensors: Mapping[str, Tensor], path: str, used: set[str]) -> Any:
    """The tree of a layout, with `Saved` for tensors and `Foreign` for nodes of classes that a file cannot make.

    Args:
        layout: what `describe` gave, out of a file that nobody vouches for.
        tensors: the tensors by name.
        path: where it stands in the whole.
        used: takes up the names of tensors that occur.

    Returns:
        The tree.

    Raises:
        ValueError: the layout is not one that `describe` writes, or does not fit the tensors.
    """

    def inner(key: Any, child: Description) -> Any:
        return parse(child, tensors, joined(path, key), used)

    if layout is None or type(layout) in (bool, int, float, str):
        return layout
    match layout:
        case {"tensor": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
            if name not in tensors or name in used:
                raise ValueError(f"{at(path)} is a tensor '{name}', which is missing or taken")
            tensor = tensors[name]
            if DTYPES.get(tensor.dtype) != dtype or list(tensor.shape) != shape:
                raise ValueError(
                    f"{at(path)} should be {dtype} {shape}, its tensor is {DTYPES.get(tensor.dtype)} "
                    f"{list(tensor.shape)}"
                )
            used.add(name)
            return Saved(name, tensor)
        case {"float": str(digits), **rest} if not rest and re.fullmatch("[0-9a-f]{16}", digits):
            return struct.unpack(">d", bytes.fromhex(digits))[0]
        case {"dict": list(items), **rest} | {"OrderedDict": list(items), **rest} if not rest:
            for item in items:
                if not (isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)):
                    raise ValueError(f"{at(path)} has an entry without key and value")
            found = _KINDS[next(iter(layout))]([(key, inner(key, child)) for key, child in items])
            if len(found) < len(items):
                raise ValueError(f"{at(path)} has a key twice")
            return found
        case {"list": list(items), **rest} | {"tuple": list(items), **rest} if not rest:
            return _KINDS[next(iter(layout))]([inner(index, child) for index, child in enumerate(items)])
        case {"BioState": dict(fields), "static": static, **rest} if not rest and tuple(fields) == DATA:
            values = {field: inner(field, child) for field, child in fields.items()}
            fresh, of_params = _static(parse(static, {}, path, set()), path)
            for field, value in values.items():
                if isinstance(value, dict) is (field in ("key", "step")) or not _of_tensors(value):
                    raise ValueError(f"{at(joined(path, field))} is {type(value).__name__}")
            return BioState(**values, fresh=fresh, layout=of_params)
        case {"node": str(name), "children": list(items), **rest} if not rest:
            for item in items:
                if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
                    raise ValueError(f"{at(path)} has an entry without name and value")
            return Foreign(name, {entry: inner(entry, child) for entry, child in items})
    raise ValueError(f"{at(path)} is {str(layout)[:60]}, which bf.save does not write")


def at(path: str) -> str:
    """How messages name a place in a tree."""
    return f"'{path}'" if path else "the tree"


def joined(path: str, key: Any) -> str:
    """Path of a child."""
    return f"{path}/{key}" if path else str(key)


def _of_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return all([_of_tensors(child) for child in value.values()])
    return isinstance(value, Saved)


def _static(static: Any, path: str) -> tuple[Fresh, Layout]:
    """The static fields of a BioState, if they are such."""

    def kinds(value: Any) -> Any:
        return tuple([kinds(item) for item in value]) if type(value) is tuple else type(value)

    if type(static) is tuple and [type(part) for part in static] == [tuple, tuple]:
        fresh, layout = static
        good = [kinds(row) == (str, str, float) for row in fresh]
        pairs = [row for row in layout if type(row) is tuple and len(row) == 2 and type(row[1]) is tuple]
        good += [kinds(row) == (str, (int,) * len(row[1])) for row in pairs]
        if all(good) and len(good) == len(fresh) + len(layout):
            return fresh, layout
    raise ValueError(f"{at(path)} is a BioState without what belongs to it")


def _check_size(number: int, path: str) -> None:
    """Python writes and reads integers of some thousand digits only."""
    if number.bit_length() > LONGEST_INTEGER:
        raise ValueError(f"{at(path)} holds an integer of {number.bit_length()} bits, more than {LONGEST_INTEGER}")


def _unique(path: str, taken: Leaves) -> str:
    """The path as the name of a tensor: one that UTF-8 can write, that is free, and that safetensors has no use for."""
    name = path.encode("utf-8", "backslashreplace").decode()
    while name in taken or name in ("", "__metadata__"):
        name += "_"
    return name


def name_of(thing: Any) -> str:
    """Where a function or class is defined, or the class of another object."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"
