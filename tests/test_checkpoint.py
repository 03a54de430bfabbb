"""Checkpoints: what is saved comes back bit for bit, and a run that goes on is the run that was not stopped."""

import dataclasses
import enum
import math
import struct
import subprocess
import sys
from collections import OrderedDict, deque
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import assert_same, mlp, values
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import biofunc as bf
from biofunc.checkpoint_layout import DTYPES


class Point(NamedTuple):
    x: object
    y: object


def learner(**changes):
    options = {"nu": 0.3, "lr": 0.05, "period": 3, "thresh": 0.01, **changes}
    return bf.chain(
        partial(bf.crystallize, crystal_thresh=options["thresh"]),
        bf.adam(),
        partial(bf.fuzzy_learning_rates, nu=options["nu"]),
        bf.descend(lr=options["lr"]),
        bf.every(options["period"], partial(bf.rejuvenate_weights, dre=1.0)),
    )


def bits(leaf):
    """A leaf as bytes; NaNs and zeros of either sign are told apart."""
    if isinstance(leaf, torch.Tensor):
        flat = leaf.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return "tensor", str(leaf.dtype), tuple(leaf.shape), bytes(flat.view(torch.uint8).tolist())
    return type(leaf).__name__, struct.pack(">d", leaf) if isinstance(leaf, float) else leaf


def frozen(tree):
    """A tree as something that is equal for trees of equal containers, order and bits alone."""
    if isinstance(tree, dict):
        return type(tree).__name__, [(type(key).__name__, key, frozen(child)) for key, child in tree.items()]
    if isinstance(tree, list | tuple | deque):
        return type(tree).__name__, [frozen(child) for child in tree]
    if isinstance(tree, bf.BioState):
        return "BioState", [
            frozen(part) for part in (*(getattr(tree, n) for n in bf.state.DATA), tree.fresh, tree.layout)
        ]
    return bits(tree)


def assert_plain(tree):
    """All tensors are contiguous, in memory of their own that can be written, and hang on no graph."""
    seen = set()
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            assert type(leaf) is torch.Tensor
            assert leaf.is_contiguous()
            assert not leaf.requires_grad
            if leaf.numel():
                leaf.flatten()[0] = 0
                assert leaf.untyped_storage().data_ptr() not in seen
                seen.add(leaf.untyped_storage().data_ptr())


# --- round trips ---


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.sampled_from([(), (1,), (3,), (0, 2), (2, 3), (2, 1, 3)]))
    size = math.prod(shape)
    raw = torch.tensor(list(draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))))
    tensor = (raw.to(torch.uint8) % 2 if dtype is torch.bool else raw.to(torch.uint8)).view(dtype).reshape(shape)
    match draw(st.sampled_from(["plain", "transposed", "expanded", "strided"])):
        case "transposed":
            return tensor.mT if tensor.dim() > 1 else tensor
        case "expanded":
            return tensor.expand(2, *shape)
        case "strided":
            return tensor[..., ::2] if shape else tensor
    return tensor


KEYS = st.one_of(st.text(max_size=4), st.integers(), st.sampled_from(["a/b", "a", "__metadata__", "", "\ud800", "é"]))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.text('\ud800\x00"\\'))
TREES = st.recursive(
    st.one_of(tensors(), PLAIN),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


@given(TREES)
def test_any_tree_comes_back_bit_for_bit(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("checkpoints") / "tree"
    bf.save(path, tree)
    loaded = bf.load(path)
    assert frozen(loaded) == frozen(tree)
    assert frozen(bf.load(path, like=tree)) == frozen(tree)
    assert_plain(loaded)


def test_a_state_comes_back_whole(tmp_path):
    params, _ = mlp(dtype=torch.bfloat16)
    learn = learner()
    state = learn.init(params, bf.random.key(0))
    bf.save(tmp_path / "run", {"params": params, "state": state})
    loaded = bf.load(tmp_path / "run")
    assert frozen(loaded) == frozen({"params": params, "state": state})
    assert loaded["state"].fresh == state.fresh
    assert loaded["state"].layout == state.layout
    again = learn(loaded["params"], params, loaded["state"])
    assert_same(again, learn(params, params, state))


def test_parameters_shared_memory_and_views_come_back_as_plain_tensors(tmp_path):
    weight = torch.nn.Parameter(values(0, (3, 4)))
    z = torch.complex(values(1, (3,)), values(2, (3,)))
    tree = {
        "parameter": weight,
        "tied": weight,
        "row": weight[1],
        "graph": 2 * weight,
        "conjugate": z.conj(),
        "negative": z.conj().imag,
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    assert tree["negative"].is_neg()
    bf.save(tmp_path / "run", tree)
    loaded = bf.load(tmp_path / "run", like=tree)
    assert frozen(loaded) == frozen(tree)
    assert_plain(loaded)


def test_other_programs_can_read_the_tensors(tmp_path):
    tree = {"layers": [{"w": torch.ones(2, 3)}], "b": torch.arange(3)}
    bf.save(tmp_path / "run", tree)
    read = safetensors.torch.load_file(tmp_path / "run")
    assert frozen(read) == frozen({"b": tree["b"], "layers/0/w": tree["layers"][0]["w"]})
    with safetensors.safe_open(tmp_path / "run", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "biofunc.checkpoint"
    assert (metadata["biofunc"], metadata["torch"]) == (bf.__version__, torch.__version__)


def test_trees_of_100_levels_come_back(tmp_path):
    for wrap in (lambda inner: {"k": inner}, lambda inner: [inner], lambda inner: (inner,)):
        tree = torch.ones(2)
        for _ in range(100):
            tree = wrap(tree)
        bf.save(tmp_path / "run", tree)
        assert frozen(bf.load(tmp_path / "run")) == frozen(bf.load(tmp_path / "run", like=tree)) == frozen(tree)


def test_the_same_tree_makes_the_same_file(tmp_path):
    params, _ = mlp()
    state = learner().init(params, bf.random.key(0))
    for name in ("one", "two"):
        bf.save(tmp_path / name, {"params": params, "state": state}, rules=learner())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    bf.save(tmp_path / "latest", {"step": 1})
    assert (tmp_path / "latest").is_symlink()
    assert bf.load(tmp_path / "run") == {"step": 1}


class Mine:
    """A node of a user's own."""

    def __init__(self, w):
        self.w = w


@pytest.fixture
def mine():
    bf.trees.register(Mine, lambda node: (node.w,), lambda node: None, lambda children, _: Mine(*children), ("w",))
    yield
    import optree

    optree.unregister_pytree_node(Mine, namespace="biofunc")


def test_nodes_of_other_classes_come_back_through_like(tmp_path, mine):
    tree = {
        "point": Point(torch.ones(2), 3),
        "mine": Mine(torch.ones(3)),
        "queue": deque([1, torch.zeros(1)], maxlen=5),
    }
    bf.save(tmp_path / "run", tree)
    like = {
        "point": Point(torch.zeros(2), 0),
        "mine": Mine(torch.zeros(3)),
        "queue": deque([0, torch.ones(1)], maxlen=5),
    }
    loaded = bf.load(tmp_path / "run", like=like)
    assert type(loaded["point"]) is Point
    assert frozen(loaded["point"]) == frozen(tree["point"])
    assert torch.equal(loaded["mine"].w, torch.ones(3))
    assert loaded["queue"].maxlen == 5
    assert frozen(loaded["queue"]) == frozen(tree["queue"])
    with pytest.raises(ValueError, match=r"'point' is a test_checkpoint\.Point, which a file cannot make; bf.load"):
        bf.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"'point' is a test_checkpoint\.Point in the checkpoint and a tuple in like"):
        bf.load(tmp_path / "run", like={**like, "point": (torch.zeros(2), 0)})


# --- what cannot be saved ---


def looped():
    tree = []
    tree.append({"again": tree})
    return tree


SPARSE = torch.eye(3).to_sparse()
REFUSED = {
    "sparse": ({"a": {"b": SPARSE}}, TypeError, r"'a/b' has layout torch.sparse_coo; save tensor.to_dense\(\)"),
    "complex128": ([torch.ones(1, dtype=torch.complex128)], TypeError, "'0' has dtype torch.complex128"),
    "meta": ({"w": torch.ones(2, device="meta")}, TypeError, "'w' is on the meta device and has no values"),
    "set": ({"w": {1, 2}}, TypeError, "'w' is set; a checkpoint holds tensors"),
    "size": ({"w": torch.ones(2).shape}, TypeError, "'w' is Size; a checkpoint holds tensors"),
    "function": ({"w": mlp}, TypeError, "'w' is function; a checkpoint holds tensors"),
    "bytes": (b"12", TypeError, "the tree is bytes"),
    "key": ({"w": {(1, 2): 3}}, TypeError, r"'w' has the key \(1, 2\); keys of a checkpoint are strings and integers"),
    "bool key": ({True: 3}, TypeError, "the tree has the key True"),
    "integer": ({"w": 1 << 5000}, ValueError, "'w' holds an integer of 5001 bits"),
    "integer key": ({"w": {1 << 5000: 1}}, ValueError, "'w' holds an integer of 5001 bits"),
    "loop": (looped(), ValueError, "nested deeper than 100; does the tree contain itself"),
    "uninitialised": (torch.nn.LazyLinear(2).weight, TypeError, "the tree is a UninitializedParameter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_refused_by_path(tmp_path, case):
    tree, kind, message = REFUSED[case]
    bf.save(tmp_path / "run", {"good": 1})
    with pytest.raises(kind, match=message):
        bf.save(tmp_path / "run", tree)
    assert bf.load(tmp_path / "run") == {"good": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_saving_inside_vmap_and_under_fake_tensors_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'w' is inside vmap or grad; save outside"):
        torch.vmap(lambda w: bf.save(tmp_path / "run", {"w": w}) or w)(torch.ones(2, 3))
    with torch._subclasses.FakeTensorMode(), pytest.raises(TypeError, match="'w' is a FakeTensor; save a plain tensor"):
        bf.save(tmp_path / "run", {"w": torch.ones(2)})
    assert not list(tmp_path.iterdir())


def test_without_safetensors_both_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: bf.save(tmp_path / "run", {}), lambda: bf.load(tmp_path / "run")):
        with pytest.raises(ModuleNotFoundError, match=r"pip install '.\[io\]' in the checkout"):
            call()


def test_import_of_biofunc_loads_neither_safetensors_nor_distributed_checkpoints():
    code = (
        "import sys, biofunc; assert 'safetensors' not in sys.modules; "
        "assert 'torch.distributed.checkpoint' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- like ---


TREE = {"params": {"w": torch.ones(2, 3), "b": torch.ones(3)}, "epoch": 3, "rates": (0.1, 0.2)}
UNLIKE = {
    "missing": ({**TREE, "more": 1}, "'more' is in like and not in the checkpoint"),
    "one more": ({"params": TREE["params"], "epoch": 3}, "'rates' is in the checkpoint and not in like"),
    "shape": (
        {**TREE, "params": {"w": torch.ones(3, 2), "b": torch.ones(3)}},
        r"'params/w' is of shape \(2, 3\) .* \(3, 2\)",
    ),
    "dtype": (
        {**TREE, "params": {"w": torch.ones(2, 3).double(), "b": torch.ones(3)}},
        "'params/w' is of dtype torch.float32 in the checkpoint and torch.float64 in like",
    ),
    "container": ({**TREE, "rates": {0: 0.1, 1: 0.2}}, "'rates' is a tuple in the checkpoint and a dict in like"),
    "length": ({**TREE, "rates": (0.1,)}, "'rates/1' is in the checkpoint and not in like"),
    "tensor for number": ({**TREE, "epoch": torch.tensor(3)}, "'epoch' is 3 in the checkpoint and a tensor in like"),
    "number for tensor": (
        {**TREE, "params": {"w": 1, "b": 2}},
        r"'params/w' is a tensor of shape \(2, 3\) in .* a int",
    ),
    "ordered": ({**TREE, "params": OrderedDict(TREE["params"])}, "'params' is a dict in .* and a OrderedDict in like"),
    "meta": (
        {**TREE, "params": {k: v.to("meta") for k, v in TREE["params"].items()}},
        "'params/w' is on the meta device",
    ),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_a_tree_that_does_not_match_is_refused_by_path(tmp_path, case):
    bf.save(tmp_path / "run", TREE)
    like, message = UNLIKE[case]
    with pytest.raises(ValueError, match=message):
        bf.load(tmp_path / "run", like=like)


def test_like_gives_order_and_device_but_no_value(tmp_path):
    bf.save(tmp_path / "run", TREE)
    like = {"rates": (None, 7), "epoch": 0, "params": {k: torch.full_like(TREE["params"][k], 9) for k in "bw"}}
    loaded = bf.load(tmp_path / "run", like=like)
    assert list(loaded) == ["rates", "epoch", "params"]
    assert list(loaded["params"]) == ["b", "w"]
    assert frozen({name: loaded[name] for name in ("epoch", "rates")}) == frozen({"epoch": 3, "rates": (0.1, 0.2)})
    meta = {**like, "params": {k: v.to("meta") for k, v in like["params"].items()}}
    assert frozen(bf.load(tmp_path / "run", like=meta, device="cpu")) == frozen(loaded)


def test_a_state_for_other_parameters_or_rules_is_refused(tmp_path):
    params, _ = mlp()
    state = learner().init(params, bf.random.key(0))
    bf.save(tmp_path / "run", {"state": state})
    fewer = bf.chain(bf.crystallize, partial(bf.fuzzy_learning_rates, nu=0.0), bf.descend(0.1)).init(
        params, bf.random.key(0)
    )
    with pytest.raises(ValueError, match="'state/slots/adam' is in the checkpoint and not in like"):
        bf.load(tmp_path / "run", like={"state": fewer})
    with pytest.raises(ValueError, match=r"'state/layout' differs .* first at "):
        bf.load(tmp_path / "run", like={"state": state.replace(layout=(*state.layout, ("z", (1,))))})
    with pytest.raises(ValueError, match="'state' is a BioState in the checkpoint and a dict in like"):
        bf.load(tmp_path / "run", like={"state": {}})


# --- rules ---


OTHER_RULES = {
    "number": (
        learner(nu=0.4),
        "fuzzy_learning_rates: nu is 0.3 in the checkpoint and 0.4 here; bf.load.path. without rules=",
    ),
    "tensor": (learner(lr=torch.tensor(0.05)), r"descend: lr is 0.05 in the checkpoint and 0.05000000074505806 here"),
    "schedule": (
        learner(lr=bf.schedules.constant(0.05)),
        r"descend: lr is 0.05 .* schedules.constant\(0.05\) here",
    ),
    "period": (
        learner(period=4),
        r"rejuvenate_weights: the checkpoint has it inside every\(3, …\), here it is inside every\(4, …\); ",
    ),
    "fewer": (
        bf.chain(*learner().rules[:-1]),
        r"made by the rules \['crystallize', .* 'rejuvenate_weights'\], given are ",
    ),
    "unbound": (
        [bf.crystallize, *learner().rules[1:]],
        "crystallize: crystal_thresh is 0.01 in the checkpoint and not given here",
    ),
}


@pytest.mark.parametrize("case", OTHER_RULES)
def test_other_rules_are_refused(tmp_path, case):
    bf.save(tmp_path / "run", {"epoch": 3}, rules=learner())
    rules, message = OTHER_RULES[case]
    with pytest.raises(ValueError, match=message):
        bf.load(tmp_path / "run", rules=rules)
    assert bf.load(tmp_path / "run") == {"epoch": 3}


def halving(every, step):
    return 0.5 ** (step / every)


def only(*names):
    model = torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(3, 3, device="meta")) for name in ("fc1", "fc2")))
    return {f"{name}.{kind}": name in names for name in ("fc1", "fc2") for kind in ("weight", "bias")}, model


def within(selection):
    return [bf.where(selection, bf.crystallize)]


DIFFERENT = {
    "schedule": [[bf.descend(bf.schedules.cosine(0.1, 0.0, steps))] for steps in (10, 11)],
    "schedule of tensors": [
        [bf.descend(bf.schedules.linear(torch.tensor(lr), 0.0, 10))] for lr in (0.1, math.nextafter(0.1, 1) + 1e-8)
    ],
    "steps": [[bf.descend(bf.schedules.piecewise(1.0, {at: 0.1}))] for at in (2**60, 2**60 + 1)],
    "function of one's own": [[bf.descend(partial(halving, n))] for n in (10, 20)],
    "keyword": [[bf.descend(partial(halving, every=n))] for n in (10, np.float64(20))],
    "layers": [
        [partial(bf.fuzzy_learning_rates, distribution=bf.distributions.layer_adaptive(paths))]
        for paths in (["a", "b"], ["b", "a"])
    ],
    "mask": [within(only(name)[0]) for name in ("fc1", "fc2")],
    "glob": [within(glob) for glob in ("fc1*", "fc2*")],
    "types": [within(bf.layers(only()[1], kind)) for kind in (torch.nn.Linear,)] + [within("fc1.weight")],
    "predicate": [within(lambda path, leaf: True), within("*")],
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_a_rule_was_made_with_is_compared(tmp_path, case):
    first, second = DIFFERENT[case]
    bf.save(tmp_path / "run", {"epoch": 3}, rules=first)
    assert bf.load(tmp_path / "run", rules=first) == {"epoch": 3}
    with pytest.raises(ValueError, match=r"(lr is|distribution is|where selects|inside where).*(here|alone)") as caught:
        bf.load(tmp_path / "run", rules=second)
    assert len(str(caught.value)) < 500


class Pace(enum.IntEnum):
    SLOW, FAST = 1, 2


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class Float(float):
    pass


@dataclasses.dataclass
class Node:
    value: object
    other: object = dataclasses.field(init=False)  # not set yet


class Method:
    def rate(self, step):
        return 0.1


def cyclic():
    node = Node(1)
    node.other = [node, node, {"again": node}]
    return node


BINDABLE = {
    "integer of an enumeration": (Pace.SLOW, Pace.FAST),
    "enumeration": (Colour.RED, Colour.BLUE),
    "a float of one's own": (Float(0.1), Float(0.2)),
    "array": (np.zeros(3), np.array([0.0, 0.0, 1e-300])),
    "flag of NumPy": (np.True_, np.False_),
    "date": (np.datetime64(1, "ns"), np.datetime64(2, "ns")),
    "set": ({1, "b"}, {2, "b"}),
    "bytes": (b"a", b"b"),
    "complex": (1j, 2j),
    "dtype": (torch.float32, torch.float64),
    "range": (range(3), range(4)),
    "fraction": (Fraction(1, 3), Fraction(1, 4)),
    "large integer": (2**70, 2**70 + 1),
    "infinite": (math.inf, math.nan),
    "keys of all kinds": ({(1, 2): 3, None: 4}, {(1, 2): 3, None: 5}),
    "dataclass": (Node(1), Node(2)),
    "large tensor": (torch.zeros(10**5), torch.zeros(10**5).index_fill_(0, torch.tensor(77), 1e-9)),
    "dtype of a tensor": (torch.zeros(3), torch.zeros(3).double()),
    "function": (math.sin, math.cos),
    "class": (Node, Float),
}
OPAQUE = {
    "object": object(),
    "sparse tensor": torch.ones(3, 3).to_sparse(),
    "meta tensor": torch.ones(3, device="meta"),
    "array of objects": np.array([object()]),
    "cycle": cyclic(),
    "module": torch.nn.Linear(2, 2, device="meta"),
    "method": Method().rate,
}


@pytest.mark.parametrize("case", BINDABLE)
def test_what_a_function_binds_is_compared(tmp_path, case):
    rules = [[bf.descend(partial(halving, every=value))] for value in BINDABLE[case]]
    for position in (0, 1):
        bf.save(tmp_path / "run", {"epoch": 3}, rules=rules[position])
        assert bf.load(tmp_path / "run", rules=rules[position]) == {"epoch": 3}
        with pytest.raises(ValueError, match=r"^descend: lr is .*halving\(every=.* here; bf") as caught:
            bf.load(tmp_path / "run", rules=rules[1 - position])
        assert len(str(caught.value)) < 500
    assert (tmp_path / "run").stat().st_size < 2000


@pytest.mark.parametrize("case", OPAQUE)
def test_an_object_that_a_function_binds_does_not_lose_the_run(tmp_path, case):
    rules = [bf.descend(partial(halving, every=OPAQUE[case]))]
    bf.save(tmp_path / "run", {"epoch": 3}, rules=rules)
    assert bf.load(tmp_path / "run", rules=rules) == {"epoch": 3}


def test_a_number_is_the_same_whoever_counts(tmp_path):
    for number in (np.float64(0.5), Float(0.5), Fraction(1, 2), 0.5):
        bf.save(tmp_path / "run", {"epoch": 3}, rules=[bf.descend(number)])
        assert bf.load(tmp_path / "run", rules=[bf.descend(0.5)]) == {"epoch": 3}


def test_a_date_is_no_number(tmp_path):
    with pytest.raises(TypeError, match="'at' is datetime64; a checkpoint holds"):
        bf.save(tmp_path / "run", {"at": np.datetime64(1, "ns")})


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.1), np.int64(-(2**63)), np.uint8(255), np.True_])
def test_numbers_of_numpy_come_back_as_those_of_python(tmp_path, number):
    bf.save(tmp_path / "run", {"loss": number})
    loss = bf.load(tmp_path / "run")["loss"]
    assert loss == number
    assert type(loss) in (bool, int, float)


def test_the_same_rules_are_accepted(tmp_path):
    lr = torch.tensor([0.1, float("nan")])[1]
    named = bf.chain(bf.named("first", bf.where("fc*", partial(bf.sgd().bind, momentum=lr)())), bf.descend(math.pi))
    axes = partial(bf.enforce_dales_principle, axis=bf.presynaptic_axes(torch.nn.Linear(2, 3, device="meta")))
    wide = partial(bf.fuzzy_learning_rates, nu=np.float64(0.3), distribution=bf.distributions.layer_adaptive(["w"]))
    for index, rules in enumerate((learner(), named, list(named.rules), [bf.crystallize], [], [axes, wide])):
        bf.save(tmp_path / f"{index}", {"epoch": 3}, rules=rules)
        assert bf.load(tmp_path / f"{index}", rules=rules) == {"epoch": 3}
    bf.save(tmp_path / "none", {"epoch": 3})
    with pytest.raises(ValueError, match=r"the checkpoint was saved without rules; bf\.load"):
        bf.load(tmp_path / "none", rules=learner())


# --- a run that goes on is the run that was not stopped ---


def gradients(params, step):
    return {path: w.sin() + 0.1 * step for path, w in params.items()}


def through(tmp_path, run, rules=None, like=True):
    bf.save(tmp_path / "run", run, rules)
    return bf.load(tmp_path / "run", like=run if like else None, rules=rules)


@pytest.mark.parametrize("like", [True, False])
def test_a_functional_run_goes_on_bit_for_bit(tmp_path, like):
    learn = learner(lr=bf.schedules.cosine(0.05, 0.001, 10))
    run = (mlp()[0], learn.init(mlp()[0], bf.random.key(3)))
    straight = run
    for step in range(10):
        straight = learn(straight[0], gradients(straight[0], step), straight[1])[::2]
        run = learn(run[0], gradients(run[0], step), run[1])[::2]
        run = through(tmp_path, run, learn, like)
    assert_same(run, straight)


def test_a_compiled_ensemble_goes_on_bit_for_bit_and_compiles_once(tmp_path, fresh_compiler):
    learn, counter = learner(), CompileCounterWithBackend("aot_eager")

    def step(params, state):
        return learn(params, {path: w.sin() for path, w in params.items()}, state)[::2]

    compiled = torch.compile(torch.vmap(step), backend=counter, fullgraph=True)
    params, _ = bf.ensemble.stack([mlp(seed) for seed in range(3)])
    straight = (params, torch.vmap(learn.init)(params, bf.random.key(torch.arange(3))))
    for index in range(8):
        if index == 4:
            resumed = through(tmp_path, straight, learn)
        straight = compiled(*straight)
    for _ in range(4):
        resumed = compiled(*resumed)
    assert_same(resumed, straight)
    assert counter.frame_count == 1


class Loop:
    """A loop with modules, torch.optim.Adam, a scheduler and attached rules."""

    def __init__(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
        weight = [bf.every(2, partial(bf.rejuvenate_weights, dre=1.0))]
        self.attached = bf.attach(
            self.optimizer, self.model, key=bf.random.key(seed), update=[bf.fuzzy_learning_rates], weight=weight
        )

    def parts(self):
        return {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "attached": self.attached}

    def train(self, steps):
        for step in steps:
            self.optimizer.zero_grad()
            self.model(values(step, (7, 6))).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()


@pytest.mark.parametrize("like", [True, False])
def test_an_attached_run_goes_on_bit_for_bit(tmp_path, like):
    straight, stopped, resumed = Loop(0), Loop(0), Loop(1)
    straight.train(range(8))
    stopped.train(range(5))
    saved = {name: part.state_dict() for name, part in stopped.parts().items()}
    for name, kept in through(tmp_path, saved, like=like).items():
        resumed.parts()[name].load_state_dict(kept)
    resumed.train(range(5, 8))
    for name, part in resumed.parts().items():
        assert frozen(part.state_dict()) == frozen(straight.parts()[name].state_dict()), name


def test_a_loop_finds_its_state_in_a_fresh_attachment(tmp_path):
    """What was renewed is kept for every parameter, so that like= fits before the first step."""
    stopped, fresh = Loop(0), Loop(1)
    stopped.train(range(5))
    bf.save(tmp_path / "run", stopped.attached.state_dict(), rules=stopped.attached)
    kept = bf.load(tmp_path / "run", like=fresh.attached.state_dict(), rules=fresh.attached)
    assert frozen(kept) == frozen(stopped.attached.state_dict())
    assert any(kept["aged"].values())
    with pytest.raises(ValueError, match=r"made by the rules .*'rejuvenate_weights'\], given are"):
        bf.load(tmp_path / "run", rules=[bf.crystallize])


@pytest.mark.parametrize("rules", [bf.crystallize, partial(bf.crystallize), "crystallize", {"a": bf.crystallize}])
def test_what_is_no_list_of_rules_is_refused(tmp_path, rules):
    with pytest.raises(TypeError, match=r"rules is .*; give a chain, what bf.attach returned, or a list of rules"):
        bf.save(tmp_path / "run", {"epoch": 3}, rules=rules)
    assert not (tmp_path / "run").exists()


def test_lists_and_tuples_become_what_they_are_in_like(tmp_path):
    bf.save(tmp_path / "run", {"betas": [0.9, 0.999], "shape": (2, 3)})
    loaded = bf.load(tmp_path / "run", like={"betas": (0.0, 0.0), "shape": [0, 0]})
    assert loaded == {"betas": (0.9, 0.999), "shape": [2, 3]}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad", "LBFGS", "RMSprop"])
def test_the_state_of_optimizers_comes_back(tmp_path, optimizer):
    w = torch.nn.Parameter(values(0, (3, 4)))
    made = getattr(torch.optim, optimizer)([w], lr=0.1)

    def loss():
        made.zero_grad()
        value = (w**2).sum()
        value.backward()
        return value

    for _ in range(2):
        made.step(loss)
    assert frozen(through(tmp_path, made.state_dict())) == frozen(made.state_dict())
