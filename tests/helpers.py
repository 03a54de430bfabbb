"""Trees, states and comparisons that the tests share."""

import torch
from hypothesis import strategies as st

import biofunc as bf
from biofunc import trees

SHAPES = [(), (3,), (0, 2), (1, 1), (4, 3), (2, 3, 2), (3, 1, 2, 2)]


def values(seed, shape, dtype=torch.float32, name="values"):
    """Standard normals, a few of them exactly 0, from biofunc's own generator: global generators stay untouched."""
    key = bf.random.fold_in(bf.random.key(seed), name)
    draw = bf.random.normal(key, shape, dtype=torch.float64)
    silent = bf.random.uniform(bf.random.fold_in(key, "silent"), shape) < 0.1
    return torch.where(silent, 0.0, draw).to(dtype)


def mlp(seed=0, dtype=torch.float32, scale=0.3):
    """Parameters of an MLP 6-5-4 as a flat dict, and gradients like them."""
    shapes = {"fc1.weight": (5, 6), "fc1.bias": (5,), "fc2.weight": (4, 5), "fc2.bias": (4,)}
    params = {path: scale * values(seed, shape, dtype, path) for path, shape in shapes.items()}
    grads = {path: 0.1 * values(seed, shape, dtype, path + " gradient") for path, shape in shapes.items()}
    return params, grads


@st.composite
def param_trees(draw, dtype=torch.float64):
    """A tree (flat dict, nested dict, or tuple of dicts) of leaves of awkward shapes, and gradients like it."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([1e-30, 0.1, 1.0, 30.0]))
    leaves = [scale * values(seed, shape, dtype, f"{i}") for i, shape in enumerate(shapes)]
    grads = [values(seed, shape, dtype, f"gradient {i}") for i, shape in enumerate(shapes)]
    build = draw(st.sampled_from([_flat, _nested, _tuples]))
    return build(leaves), build(grads)


def _flat(leaves):
    return {f"layer{i}.weight": leaf for i, leaf in reversed(list(enumerate(leaves)))}


def _nested(leaves):
    return {"body": {f"{i}": {"w": leaf} for i, leaf in enumerate(leaves[1:])}, "head": leaves[0], "none": {}}


def _tuples(leaves):
    return ({"w": leaves[0]}, (), tuple(leaves[1:]))


def make_state(rule, params, key=None, **keywords):
    """State of one rule in which synapses differ: rates and memory are neither 1 nor 0 where the rule keeps them."""
    return bf.init(params, bf.random.key(7) if key is None else key, rule, **keywords)


def members(count, dtype=torch.float32):
    """Stacked params, grads and keys of an ensemble."""
    trees_ = [mlp(seed, dtype) for seed in range(count)]
    params, grads = bf.ensemble.stack(trees_)
    return params, grads, bf.random.key(torch.arange(count))


def leaves(tree):
    """Leaves by path of any tree, a BioState and tuples of trees included."""
    return trees.flatten(tree)[0]


def assert_same(left, right, ulps=0):
    """Equal structure, paths, dtypes and values; bit for bit, or within so many units in the last place."""
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for path in left:
        a, b = left[path], right[path]
        assert a.dtype == b.dtype, path
        assert a.shape == b.shape, path
        if ulps == 0 or not a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()), path
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), path
        else:
            tolerance = ulps * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 1e-3, equal_nan=True)
