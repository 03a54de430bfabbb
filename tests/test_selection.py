"""Which leaves are synapses, and rules that act on some of them: everything else is not touched."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import biofunc as bf


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def normal(*shape, seed=0):
    return bf.random.normal(bf.random.key(seed), shape, dtype=torch.float64)


def flat():
    """Parameters named like those of a module."""
    shapes = {
        "conv.weight": (4, 2, 3),
        "conv.bias": (4,),
        "fc1.weight": (3, 4),
        "fc1.bias": (3,),
        "norm.weight": (3,),
        "fc2.weight": (2, 3),
        "scale": (),
    }
    return {path: normal(*shape, seed=i) for i, (path, shape) in enumerate(shapes.items())}


def nested():
    return {"layers": [{"w": normal(3, 2), "b": normal(3)}, {"w": normal(2, 3), "b": normal(2)}], "gain": (normal(),)}


def selected(where, params=None):
    """Paths of the synapses of a state made with a selection."""
    params = flat() if params is None else params
    return set(bf.init(params, bf.random.key(0), where=where).plasticity)


@bf.rule(phase="weights", memory={"age": 0.0})
def double(params, grads, state, *, factor=2.0, name):
    """Doubles weights and directions and counts."""
    ages = {path: state.slots[name]["age"][path] + 1 for path in params}
    weights = {path: factor * w for path, w in params.items()}
    return weights, {path: factor * g for path, g in grads.items()}, state.with_slot(name, age=ages)


def applied(learn, params, where=None, steps=1):
    grads = torch.utils._pytree.tree_map(torch.ones_like, params)
    state = learn.init(params, bf.random.key(0), where=where)
    for _ in range(steps):
        new_params, new_grads, state = learn(params, grads, state)
    return grads, new_params, new_grads, state


# --- which leaves are synapses ---


def test_by_default_leaves_of_two_or_more_dimensions_are_synapses():
    assert selected(None) == {"conv.weight", "fc1.weight", "fc2.weight"}
    assert selected(None, nested()) == {"layers/0/w", "layers/1/w"}
    assert selected(None, {"b": ones(3)}) == set()
    assert selected(None, {}) == set()


@given(dims=st.lists(st.integers(0, 4), max_size=6))
def test_the_default_asks_for_dimensions_alone_whatever_the_size(dims):
    params = {f"p{i}": torch.zeros([i % 3] * n) for i, n in enumerate(dims)}
    assert selected(None, params) == {path for path, leaf in params.items() if leaf.dim() >= 2}


@pytest.mark.parametrize(
    ("glob", "paths"),
    [
        ("fc1.weight", {"fc1.weight"}),
        ("fc*.weight", {"fc1.weight", "fc2.weight"}),
        ("fc?.bias", {"fc1.bias"}),
        ("*.weight", {"conv.weight", "fc1.weight", "norm.weight", "fc2.weight"}),
        ("[cn]*.weight", {"conv.weight", "norm.weight"}),
        ("*", set(flat())),
    ],
)
def test_a_glob_selects_the_paths_that_it_matches_whole_and_by_case(glob, paths):
    assert selected(glob) == paths


def test_a_glob_crosses_the_slashes_of_a_nested_tree():
    assert selected("layers/*/w", nested()) == {"layers/0/w", "layers/1/w"}
    assert selected("*/b", nested()) == {"layers/0/b", "layers/1/b"}
    assert selected("layers/1*", nested()) == {"layers/1/w", "layers/1/b"}


def test_a_predicate_sees_each_path_with_its_leaf():
    params, seen = flat(), {}

    def large(path, leaf):
        seen[path] = leaf
        return leaf.numel() > 6

    assert selected(large, params) == {"conv.weight", "fc1.weight"}
    assert set(seen) == set(params)
    assert all([seen[path] is leaf for path, leaf in params.items()])


def test_a_mask_tree_selects_where_it_is_true():
    mask = {path: path.startswith("fc") for path in flat()}
    assert selected(mask) == {"fc1.weight", "fc1.bias", "fc2.weight"}
    assert selected(dict(reversed(mask.items()))) == {"fc1.weight", "fc1.bias", "fc2.weight"}


def test_a_mask_tree_nests_like_the_parameters():
    mask = {"layers": [{"w": False, "b": False}, {"w": True, "b": False}], "gain": (True,)}
    assert selected(mask, nested()) == {"layers/1/w", "gain/0"}


def test_a_tree_that_is_one_leaf_has_a_mask_that_is_one_bool():
    assert selected(True, ones(2, 2)) == {""}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Conv1d(4, 6, 2), nn.LayerNorm(6), nn.Linear(6, 6))
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Bilinear(6, 6, 2)


def net():
    with torch.random.fork_rng(devices=[]):
        model = Net()
    return model, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("types", "paths"),
    [
        ([nn.Linear], {"body.2.weight", "attention.out_proj.weight"}),  # a subclass of Linear counts
        ([nn.Conv1d], {"body.0.weight"}),
        ([nn.Linear, nn.Conv1d], {"body.0.weight", "body.2.weight", "attention.out_proj.weight"}),
        ([nn.Embedding, nn.Bilinear], {"table.weight", "head.weight"}),
        ([nn.MultiheadAttention], {"attention.in_proj_weight"}),
    ],
)
def test_layers_selects_the_weights_of_layers_by_type(types, paths):
    model, params = net()
    assert selected(bf.layers(model, *types), params) == paths


def test_layers_of_a_model_that_is_a_layer():
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(2, 3)
    assert selected(bf.layers(model, nn.Linear), {n: p.detach() for n, p in model.named_parameters()}) == {"weight"}


def test_layers_of_a_type_that_the_model_lacks_are_refused():
    model, _ = net()
    with pytest.raises(ValueError, match="the model has no layer of type Conv2d, Conv3d"):
        bf.layers(model, nn.Conv2d, nn.Conv3d)
    with pytest.raises(ValueError, match="no layer of type"):
        bf.layers(model, nn.LayerNorm)  # its gains have one dimension
    with pytest.raises(ValueError, match=r"\(none given\)"):
        bf.layers(model)


def test_chain_init_and_init_select_alike():
    learn = bf.chain(bf.crystallize, bf.fuzzy_learning_rates, bf.descend(0.1))
    state = learn.init(flat(), bf.random.key(0), where="fc*.weight")
    assert set(state.plasticity) == {"fc1.weight", "fc2.weight"}
    assert set(state.slots["fuzzy_learning_rates"]["innate"]) == {"fc1.weight", "fc2.weight"}


def test_a_selection_works_inside_vmap():
    params = {"a": normal(4, 3, 2), "b": normal(4, 3)}
    keys = bf.random.key(torch.arange(4))
    state = torch.vmap(lambda p, k: bf.init(p, k, bf.crystallize, where=lambda path, leaf: leaf.dim() == 1))(
        params, keys
    )
    assert {path: leaf.shape for path, leaf in state.plasticity.items()} == {"b": (4, 3)}


# --- errors ---


def nothing(path, leaf):
    return False


@pytest.mark.parametrize(
    ("where", "shown"),
    [("fc3.*", "'fc3.*'"), ("FC1.weight", "'FC1.weight'"), ("fc1", "'fc1'"), (nothing, "'nothing'"), ("", "''")],
)
def test_an_empty_selection_is_refused_with_the_paths_that_there_are(where, shown):
    with pytest.raises(ValueError, match="selects no synapse") as error:
        selected(where)
    assert f"where={shown}" in str(error.value)
    for path in flat():
        assert path in str(error.value)


def test_a_mask_of_false_alone_is_an_empty_selection():
    with pytest.raises(ValueError, match=r"where='mask' selects no synapse; the paths are: .*fc1\.weight"):
        selected(dict.fromkeys(flat(), False))


def test_a_selection_from_an_empty_tree_is_refused():
    with pytest.raises(ValueError, match=r"selects no synapse; the paths are: \(none\)"):
        selected("*", {})


def test_a_mask_with_a_path_that_params_lack_names_it():
    mask = {**dict.fromkeys(flat(), True), "fc9.weight": True}
    with pytest.raises(KeyError, match=r"where has a leaf 'fc9\.weight' that params lacks"):
        selected(mask)


def test_a_mask_without_a_path_of_params_names_it():
    mask = dict.fromkeys(flat(), True)
    del mask["fc1.bias"]
    with pytest.raises(KeyError, match=r"where has no leaf 'fc1\.bias' that params has"):
        selected(mask)


def test_a_nested_mask_of_another_structure_names_the_path():
    with pytest.raises(KeyError, match="layers/1/b"):
        selected({"layers": [{"w": True, "b": False}, {"w": True}], "gain": (False,)}, nested())
    with pytest.raises(KeyError, match="'gain'"):
        selected({"layers": [{"w": True, "b": False}, {"w": True, "b": False}], "gain": False}, nested())


@pytest.mark.parametrize("flag", [1, 0.0, "yes", torch.tensor(True), torch.ones(3, 4, dtype=torch.bool)])
def test_a_mask_leaf_that_is_no_bool_is_refused_by_path(flag):
    mask = {**dict.fromkeys(flat(), True), "fc1.weight": flag}
    with pytest.raises(TypeError, match=r"(?s)where leaf 'fc1\.weight' is .*True or False"):
        selected(mask)


def test_errors_of_a_selection_are_those_of_where_too():
    for selection, error, message in [
        ("fc3.*", ValueError, r"where='fc3\.\*' selects no synapse; the paths are: .*conv\.weight"),
        ({"fc1.weight": True}, KeyError, "where has no leaf"),
        ({**dict.fromkeys(flat(), True), "scale": 1}, TypeError, "where leaf 'scale' is 1"),
    ]:
        learn = bf.chain(bf.where(selection, double))
        with pytest.raises(error, match=message):
            learn.init(flat(), bf.random.key(0))


def test_where_refuses_what_is_no_rule():
    with pytest.raises(TypeError, match="is not a rule"):
        bf.where("*", len)


# --- rules that act on some synapses ---

SELECTIONS = {
    "glob": "fc*.weight",
    "predicate": lambda path, leaf: path.startswith("fc") and leaf.dim() == 2,
    "mask": {path: path in ("fc1.weight", "fc2.weight") for path in flat()},
}
CHOSEN = {"fc1.weight", "fc2.weight"}


def frames(selection):
    """The same restricted rule, wrapped in all orders, and the name of its slot."""
    return {
        "where": (bf.where(selection, double), "double"),
        "every(where)": (bf.every(1, bf.where(selection, double)), "double"),
        "where(every)": (bf.where(selection, bf.every(1, double)), "double"),
        "named(where)": (bf.named("other", bf.where(selection, double)), "other"),
        "where(named)": (bf.where(selection, bf.named("other", double)), "other"),
        "all": (bf.named("other", bf.every(1, bf.where(selection, bf.every(1, double)))), "other"),
        "where(where)": (bf.where("*.weight", bf.where(selection, double)), "double"),
        "partial": (bf.where(selection, partial(double, factor=2.0)), "double"),
    }


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("frame", [name for name in frames("*") if name != "where(where)"])
def test_where_touches_the_selected_leaves_and_passes_on_the_others_as_the_same_objects(selection, frame):
    rule, name = frames(SELECTIONS[selection])[frame]
    params = flat()
    grads, new_params, new_grads, state = applied(bf.chain(rule), params)
    assert list(new_params) == list(params)
    assert set(state.slots) == {name}
    assert set(state.slots[name]["age"]) == CHOSEN
    for path, leaf in params.items():
        if path in CHOSEN:
            assert torch.equal(new_params[path], 2 * leaf)
            assert torch.equal(new_grads[path], 2 * ones(*leaf.shape))
            assert torch.equal(state.slots[name]["age"][path], ones(*leaf.shape))
        else:
            assert new_params[path] is leaf
            assert new_grads[path] is grads[path]


@pytest.mark.parametrize("selection", ["glob", "predicate"])
def test_where_in_where_selects_what_both_select(selection):
    params = flat()
    rule = bf.where("fc1.*", bf.where(SELECTIONS[selection], double))
    grads, new_params, new_grads, state = applied(bf.chain(rule), params)
    assert set(state.slots["double"]["age"]) == {"fc1.weight"}
    assert torch.equal(new_params["fc1.weight"], 2 * params["fc1.weight"])
    for path in params.keys() - {"fc1.weight"}:
        assert new_params[path] is params[path]
        assert new_grads[path] is grads[path]


def test_where_in_a_nested_tree_keeps_its_structure():
    params = nested()
    _, new_params, _, state = applied(bf.chain(bf.where("layers/1/*", double)), params)
    assert set(state.slots["double"]["age"]) == {"layers/1/w"}
    assert torch.equal(new_params["layers"][1]["w"], 2 * params["layers"][1]["w"])
    for path in ("w", "b"):
        assert new_params["layers"][0][path] is params["layers"][0][path]
    assert new_params["layers"][1]["b"] is params["layers"][1]["b"]
    assert type(new_params["gain"]) is tuple
    assert new_params["gain"][0] is params["gain"][0]


def test_where_takes_layers_of_a_model():
    model, params = net()
    _, new_params, _, _ = applied(bf.chain(bf.where(bf.layers(model, nn.Linear), double)), params)
    changed = {path for path, leaf in params.items() if new_params[path] is not leaf}
    assert changed == {"body.2.weight", "attention.out_proj.weight"}


def test_a_compiled_rule_takes_layers_of_a_model():
    model, params = net()
    learn = bf.chain(bf.where(bf.layers(model, nn.Conv1d), double))
    compiled = torch.compile(lambda *inputs: learn(*inputs), backend="aot_eager", fullgraph=True)
    inputs = (params, params, learn.init(params, bf.random.key(0)))
    new_params = compiled(*inputs)[0]
    for path, leaf in params.items():
        assert torch.equal(new_params[path], 2 * leaf if path == "body.0.weight" else leaf)


def test_a_step_that_every_skips_passes_on_all_leaves_as_the_same_objects():
    params = flat()
    learn = bf.chain(bf.every(3, bf.where("fc*.weight", double)))
    grads, state = {path: torch.ones_like(leaf) for path, leaf in params.items()}, learn.init(params, bf.random.key(0))
    changed = []
    for _ in range(6):
        new_params, new_grads, state = learn(params, grads, state)
        changed.append({path for path in params if new_params[path] is not params[path]})
        assert changed[-1] == {path for path in params if new_grads[path] is not grads[path]}
    assert changed == [set(), set(), CHOSEN, set(), set(), CHOSEN]
    assert torch.equal(state.slots["double"]["age"]["fc1.weight"], torch.full((3, 4), 2.0, dtype=torch.float64))


def test_other_leaves_are_the_same_objects_inside_vmap_too():
    params = {path: torch.stack([leaf, 3 * leaf]) for path, leaf in flat().items()}
    learn = bf.chain(bf.every(2, bf.where("fc*.weight", double)))
    untouched = []

    def step(params, key):
        grads = {path: torch.ones_like(leaf) for path, leaf in params.items()}
        state = learn.init(params, key)
        _, _, state = learn(params, grads, state)
        new_params, new_grads, _ = learn(params, grads, state)
        untouched.append({path for path in params if new_params[path] is params[path]})
        untouched.append({path for path in params if new_grads[path] is grads[path]})
        return new_params

    new_params = torch.vmap(step)(params, bf.random.key(torch.arange(2)))
    assert untouched == [params.keys() - CHOSEN] * 2
    for path, leaf in params.items():
        assert torch.equal(new_params[path], 2 * leaf if path in CHOSEN else leaf)


def test_leaves_that_are_no_synapses_are_untouched_without_where():
    params = flat()
    grads, new_params, new_grads, _ = applied(bf.chain(double), params, where="fc1.weight")
    for path in params.keys() - {"fc1.weight"}:
        assert new_params[path] is params[path]
        assert new_grads[path] is grads[path]
    assert torch.equal(new_params["fc1.weight"], 2 * params["fc1.weight"])


def test_a_rule_by_itself_is_restricted_too():
    params = flat()
    rule = bf.where("fc1.weight", double)
    state = bf.init(params, bf.random.key(0), rule)
    new_params, _, state = rule(params, params, state, factor=3.0)
    assert torch.equal(new_params["fc1.weight"], 3 * params["fc1.weight"])
    assert all([new_params[path] is params[path] for path in params if path != "fc1.weight"])


def test_two_rules_of_one_kind_act_on_two_groups_under_two_names():
    params = flat()
    learn = bf.chain(bf.where("fc1.*", double), bf.named("triple", bf.where("fc2.*", partial(double, factor=3.0))))
    _, new_params, _, state = applied(learn, params)
    assert torch.equal(new_params["fc1.weight"], 2 * params["fc1.weight"])
    assert torch.equal(new_params["fc2.weight"], 3 * params["fc2.weight"])
    assert new_params["conv.weight"] is params["conv.weight"]
    assert {name: set(slot["age"]) for name, slot in state.slots.items()} == {
        "double": {"fc1.weight"},
        "triple": {"fc2.weight"},
    }


@pytest.mark.parametrize("rule", [double, bf.rejuvenate_weights, bf.crystallize], ids=["memory", "none", "rates"])
@pytest.mark.parametrize("frame", [lambda rule: rule, partial(bf.every, 2), partial(bf.named, "x")])
def test_a_rule_restricted_to_biases_alone_is_refused_at_init(rule, frame):
    with pytest.raises(ValueError, match=r"where selects no synapse, only conv\.bias, fc1\.bias"):
        bf.init(flat(), bf.random.key(0), frame(bf.where("*.bias", rule)))


def test_a_rule_restricted_to_leaves_that_the_chain_leaves_out_is_refused_at_init():
    learn = bf.chain(bf.where("fc2.weight", double))
    with pytest.raises(ValueError, match=r"double: where selects no synapse, only fc2\.weight"):
        learn.init(flat(), bf.random.key(0), where="fc1.weight")


def test_descend_and_optimizers_may_be_restricted_to_any_leaves():
    params = flat()
    learn = bf.chain(bf.where("*.bias", bf.sgd(momentum=0.9)), bf.where("*.bias", bf.descend(0.5)))
    _, new_params, _, state = applied(learn, params)
    assert set(state.slots["sgd"]["momentum"]) == {"conv.bias", "fc1.bias"}
    for path, leaf in params.items():
        if path.endswith("bias"):
            assert torch.equal(new_params[path], leaf - 0.5)
        else:
            assert new_params[path] is leaf


def test_a_restriction_changes_nothing_about_the_noise_of_the_selected_leaves():
    params = flat()
    grads = {path: torch.ones_like(leaf) for path, leaf in params.items()}
    whole, part = bf.volume_dependent_lr, bf.where("fc1.weight", bf.volume_dependent_lr)
    _, everywhere, _ = whole(params, grads, bf.init(params, bf.random.key(0), whole))
    _, somewhere, _ = part(params, grads, bf.init(params, bf.random.key(0), part))
    assert torch.equal(everywhere["fc1.weight"], somewhere["fc1.weight"])
    assert somewhere["fc2.weight"] is grads["fc2.weight"]
    assert not torch.equal(everywhere["fc2.weight"], grads["fc2.weight"])


def test_rates_are_written_and_applied_at_the_selected_leaves_alone():
    params = flat()
    learn = bf.chain(
        bf.where("fc1.weight", partial(bf.crystallize, crystal_thresh=1e9)),
        partial(bf.fuzzy_learning_rates, nu=0),
        bf.descend(0.0),
    )
    _, _, directions, state = applied(learn, params, steps=2)
    assert state.plasticity["fc1.weight"].shape == (3, 4)
    torch.testing.assert_close(directions["fc1.weight"], 0.36 * ones(3, 4))
    for path in ("conv.weight", "fc2.weight"):
        assert state.plasticity[path].shape == ()
        assert torch.equal(directions[path], torch.ones_like(params[path]))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_compiled_restriction_is_the_eager_one(selection):
    params = flat()
    rule = bf.where(SELECTIONS[selection], double)
    learn = bf.chain(bf.every(2, rule), bf.named("other", rule))
    compiled = torch.compile(lambda *inputs: learn(*inputs), backend="aot_eager", fullgraph=True)
    left = right = (params, params, learn.init(params, bf.random.key(0)))
    for _ in range(3):
        left, right = learn(*left), compiled(*right)
    for path in params:
        torch.testing.assert_close(right[0][path], left[0][path], rtol=1e-13, atol=1e-13)
    assert set(right[2].slots["other"]["age"]) == CHOSEN
