"""Ensembles: a member is what it would be alone, and can leave and run on alone."""

import re
from functools import partial
from typing import NamedTuple

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_

import biofunc as bf


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class WithBuffers(nn.Module):
    """A random buffer and a counter beside a parameter that needs no gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.frozen = nn.Parameter(torch.rand(()), requires_grad=False)
        self.register_buffer("noise", torch.randn(4))
        self.register_buffer("count", torch.tensor(7))


def alone(make_model, seed):
    """A model made under its seed, with PyTorch's own calls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model()


def normal(*shape, seed=0):
    return bf.random.normal(bf.random.key(seed), shape, dtype=torch.float64)


# --- init ---


@pytest.mark.parametrize("make_model", [mlp, WithBuffers])
def test_a_member_is_the_model_made_under_its_seed_alone(make_model):
    seeds = [3, 0, -1, 2**63 - 1, -(2**63), 2**64 - 1]
    params, buffers = bf.ensemble.init(make_model, seeds)
    for i, seed in enumerate(seeds):
        model = alone(make_model, seed)
        assert list(params) == [name for name, _ in model.named_parameters()]
        assert list(buffers) == [name for name, _ in model.named_buffers()]
        for name, parameter in model.named_parameters():
            assert torch.equal(params[name][i], parameter)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffers[name][i], buffer)
            assert buffers[name].dtype == buffer.dtype


@given(others=st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4), place=st.integers(0, 4))
def test_a_member_depends_on_neither_the_other_seeds_nor_their_number(others, place):
    place = min(place, len(others))
    params, _ = bf.ensemble.init(mlp, [*others[:place], 11, *others[place:]])
    for name, parameter in alone(mlp, 11).named_parameters():
        assert params[name].shape == (len(others) + 1, *parameter.shape)
        assert torch.equal(params[name][place], parameter)


def test_equal_seeds_give_equal_members_and_other_seeds_others():
    params, _ = bf.ensemble.init(mlp, [5, 6, 5])
    for leaf in params.values():
        assert torch.equal(leaf[0], leaf[2])
        assert not torch.equal(leaf[0], leaf[1])


def test_seeds_may_be_any_iterable():
    params, _ = bf.ensemble.init(mlp, range(3))
    for again in ((0, 1, 2), (seed for seed in range(3))):
        same, _ = bf.ensemble.init(mlp, again)
        assert all([torch.equal(params[name], same[name]) for name in params])


def test_the_global_generator_is_left_where_it_was():
    before = torch.random.get_rng_state()
    bf.ensemble.init(mlp, [1, 2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_global_generator_is_left_where_it_was_when_a_model_cannot_be_made():
    def broken():
        torch.rand(3)
        raise ZeroDivisionError("no model")

    before = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        bf.ensemble.init(broken, [1, 2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_members_are_plain_tensors_that_share_nothing_with_a_model():
    with torch.random.fork_rng(devices=[]):
        model = mlp()
    params, buffers = bf.ensemble.init(lambda: model, [0, 1])
    assert buffers == {}
    for name, leaf in params.items():
        assert type(leaf) is torch.Tensor
        assert not leaf.requires_grad
        assert leaf.is_leaf
        assert leaf.is_contiguous()
        assert leaf.untyped_storage().data_ptr() != model.get_parameter(name).untyped_storage().data_ptr()
    assert all([parameter.requires_grad for parameter in model.parameters()])


def test_dtypes_stay_as_made():
    params, buffers = bf.ensemble.init(lambda: WithBuffers().to(torch.bfloat16), [0, 1])
    assert {leaf.dtype for leaf in params.values()} == {torch.bfloat16}
    assert buffers["count"].dtype == torch.int64
    assert torch.equal(buffers["count"], torch.tensor([7, 7]))


def test_members_run_under_vmap_as_they_run_alone():
    params, buffers = bf.ensemble.init(lambda: mlp().double(), range(4))
    x = normal(6, 4)
    shell = alone(mlp, 0)
    outputs = torch.vmap(lambda p, b: functional_call(shell, (p, b), (x,)))(params, buffers)
    for seed in range(4):
        torch.testing.assert_close(outputs[seed], alone(mlp, seed).double()(x), rtol=1e-13, atol=1e-13)


def test_seeds_may_be_integers_of_numpy_and_of_tensors():
    wanted = bf.ensemble.init(mlp, [3, 2**63])
    for seeds in (torch.tensor([3, 2**63], dtype=torch.uint64), numpy.array([3, 2**63], dtype=numpy.uint64)):
        for made, expected in zip(bf.ensemble.init(mlp, seeds), wanted, strict=True):
            assert all([torch.equal(leaf, expected[path]) for path, leaf in made.items()])
    assert torch.equal(bf.ensemble.init(mlp, list(numpy.array([3])))[0]["0.weight"][0], wanted[0]["0.weight"][0])
    for seeds in (torch.tensor([0.5]), torch.tensor([True]), numpy.array([True]), torch.tensor([[1]])):
        with pytest.raises(TypeError, match="every seed is an integer"):
            bf.ensemble.init(mlp, seeds)
    with pytest.raises(TypeError, match=r"seeds is tensor\(3\); give one integer per member"):
        bf.ensemble.init(mlp, torch.tensor(3))


def test_a_stack_without_vmap_is_warned_of():
    params, _ = bf.ensemble.init(mlp, range(3))
    learn, keys = bf.chain(bf.crystallize, bf.fuzzy_learning_rates), bf.random.key(torch.arange(3))
    with pytest.warns(UserWarning, match=r"^params look like the stack of an ensemble: '.*bias' has shape .*vmap"):
        learn.init(params, keys[0])
    with pytest.warns(UserWarning, match=r"^leaves look like the stack of an ensemble.*measure an ensemble und"):
        bf.measure.sign_balance(params)
    # warnings are errors here: what is right, chosen by hand or no stack is not warned of
    state = torch.vmap(learn.init)(params, keys)
    torch.vmap(bf.measure.sign_balance)(params)
    learn.init(params, keys[0], where="*weight")
    learn.init({**params, "scale": torch.ones(2)}, keys[0])
    learn.init({"w": torch.ones(3, 2, 2), "b": torch.ones(3, 2)}, keys[0])
    assert all(rate.shape == params[path].shape for path, rate in state.plasticity.items())


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds is empty"):
        bf.ensemble.init(mlp, [])


@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match=f"seeds holds {seed!r}; every seed is an integer"):
        bf.ensemble.init(mlp, [0, seed])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused_by_value(seed):
    with pytest.raises(ValueError, match=str(seed)):
        bf.ensemble.init(mlp, [0, seed])


def test_make_model_must_return_a_module():
    with pytest.raises(TypeError, match=r"make_model returned dict; it must return an nn\.Module"):
        bf.ensemble.init(dict, [0])


def test_models_of_different_shapes_are_refused_by_path():
    widths = iter([4, 5])
    with pytest.raises(ValueError, match=r"weight' has shape \(2, 5\) in member 1 and \(2, 4\) in member 0"):
        bf.ensemble.init(lambda: nn.Linear(next(widths), 2), [0, 1])


def normalised():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))


def test_layers_with_running_statistics_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"layers 1, 2\.1 keep running statistics.*replace_all_batch_norm_modules_"):
        bf.ensemble.init(normalised, [0])


def test_batch_norm_without_running_statistics_is_an_ensemble():
    def make_model():
        return replace_all_batch_norm_modules_(normalised())

    params, buffers = bf.ensemble.init(make_model, [0, 1])
    assert buffers == {}
    x, shell = normal(6, 4).float(), alone(make_model, 0)
    outputs = torch.vmap(lambda p: functional_call(shell, p, (x,)))(params)
    for seed in range(2):
        torch.testing.assert_close(outputs[seed], alone(make_model, seed)(x), rtol=1e-5, atol=1e-5)


# --- stack and unstack ---


class Pair(NamedTuple):
    weights: dict
    scale: torch.Tensor


def tree(seed):
    """A nested tree: a named tuple, a list, dicts, a 0-d tensor, an integer tensor and an empty node."""
    return (Pair({"w": normal(2, 3, seed=seed)}, normal(seed=seed)), [{"n": torch.tensor([seed, 1])}, ()])


def learner():
    return bf.chain(
        bf.crystallize, bf.adam(), bf.fuzzy_learning_rates, bf.descend(0.01), bf.every(2, bf.rejuvenate_weights)
    )


def some_state(seed):
    params = {"a": normal(3, 2, seed=seed), "b": normal(3, seed=seed)}
    learn = learner()
    return learn(params, params, learn.init(params, bf.random.key(seed)))[2]


def leaves_of(anything):
    return torch.utils._pytree.tree_leaves(anything)


def test_stack_puts_members_on_a_leading_axis_of_each_leaf():
    stacked = bf.ensemble.stack([tree(0), tree(1), tree(2)])
    assert type(stacked[0]) is Pair
    assert stacked[1][1] == ()
    for seed in range(3):
        assert torch.equal(stacked[0].weights["w"][seed], tree(seed)[0].weights["w"])
        assert torch.equal(stacked[0].scale[seed], tree(seed)[0].scale)
        assert torch.equal(stacked[1][0]["n"][seed], tree(seed)[1][0]["n"])
    assert stacked[1][0]["n"].dtype == torch.int64


def test_a_stacked_state_is_the_state_of_a_vmapped_init():
    params = [{"a": normal(3, 2, seed=seed), "b": normal(3, seed=seed)} for seed in range(3)]
    keys = bf.random.key(torch.arange(3))
    vmapped = torch.vmap(learner().init)(bf.ensemble.stack(params), keys)
    stacked = bf.ensemble.stack([learner().init(p, key) for p, key in zip(params, keys, strict=True)])
    assert isinstance(stacked, bf.BioState)
    assert stacked.fresh == vmapped.fresh
    assert torch.equal(stacked.key, keys)
    assert torch.equal(stacked.step, torch.zeros(3, dtype=torch.int64))
    for left, right in zip(leaves_of(stacked), leaves_of(vmapped), strict=True):
        assert torch.equal(left, right)
        assert (left.dtype, left.stride()) == (right.dtype, right.stride())


@pytest.mark.parametrize("make", [tree, some_state, lambda seed: normal(2, seed=seed)], ids=["tree", "state", "leaf"])
@pytest.mark.parametrize("count", [1, 3])
def test_unstack_is_the_inverse_of_stack(make, count):
    members = [make(seed) for seed in range(count)]
    again = bf.ensemble.unstack(bf.ensemble.stack(members))
    assert len(again) == count
    for member, back in zip(members, again, strict=True):
        assert torch.utils._pytree.tree_structure(back) == torch.utils._pytree.tree_structure(member)
        for left, right in zip(leaves_of(member), leaves_of(back), strict=True):
            assert torch.equal(left, right)
            assert left.dtype == right.dtype


def test_stack_is_the_inverse_of_unstack():
    params, _ = bf.ensemble.init(mlp, range(3))
    again = bf.ensemble.stack(bf.ensemble.unstack(params))
    assert list(again) == list(params)
    assert all([torch.equal(again[name], params[name]) for name in params])


def test_members_are_matched_by_path_whatever_the_order_of_their_dicts():
    stacked = bf.ensemble.stack([{"a": normal(2), "b": normal(3)}, {"b": normal(3, seed=1), "a": normal(2, seed=1)}])
    assert torch.equal(stacked["a"][1], normal(2, seed=1))
    assert torch.equal(stacked["b"][1], normal(3, seed=1))


def test_stacks_and_members_share_no_memory():
    members = [{"w": normal(2, 3, seed=seed)} for seed in range(2)]
    stacked = bf.ensemble.stack(members)
    taken_out = bf.ensemble.unstack(stacked)
    stacked["w"].zero_()
    for seed in range(2):
        assert torch.equal(members[seed]["w"], normal(2, 3, seed=seed))
        assert torch.equal(taken_out[seed]["w"], normal(2, 3, seed=seed))
        assert taken_out[seed]["w"].is_contiguous()
        assert taken_out[seed]["w"].untyped_storage().nbytes() == 2 * 3 * 8
    taken_out[0]["w"].fill_(1.0)
    assert torch.equal(taken_out[1]["w"], normal(2, 3, seed=1))
    assert not stacked["w"].any()


def test_no_members_are_refused():
    with pytest.raises(ValueError, match="members is empty"):
        bf.ensemble.stack([])


@pytest.mark.parametrize("other", [{"a": normal(2)}, {"a": normal(2), "c": normal(2)}, (normal(2), normal(2))])
def test_a_member_of_another_structure_is_named(other):
    with pytest.raises(ValueError, match="member 2 is a tree of another structure than member 0"):
        bf.ensemble.stack([{"a": normal(2), "b": normal(2)}, {"a": normal(2), "b": normal(2)}, other])


def test_a_state_of_another_chain_is_another_structure():
    params = {"a": normal(2, 2)}
    states = [bf.init(params, bf.random.key(0), *rules) for rules in ([], [bf.crystallize])]
    with pytest.raises(ValueError, match="member 1 is a tree of another structure"):
        bf.ensemble.stack(states)


def test_a_member_of_another_shape_is_named_with_its_path():
    members = [{"layers": [{"w": normal(2, 3)}]}, {"layers": [{"w": normal(3, 2)}]}]
    with pytest.raises(ValueError, match=r"leaf 'layers/0/w' has shape \(3, 2\) in member 1 and \(2, 3\) in member 0"):
        bf.ensemble.stack(members)


def test_a_member_of_another_dtype_is_refused_not_promoted():
    with pytest.raises((TypeError, ValueError), match=r"layers/0/w.*float"):
        bf.ensemble.stack([{"layers": [{"w": normal(2)}]}, {"layers": [{"w": normal(2).float()}]}])


def test_leaves_without_a_common_member_axis_are_named():
    with pytest.raises(ValueError, match="leaf 'b' has 2 members, the first leaf 3"):
        bf.ensemble.unstack({"a": normal(3, 2), "b": normal(2, 3)})
    with pytest.raises(
        ValueError, match="leaf 'b' has no members, the first leaf 3; the leaves of an ensemble are tensors"
    ):
        bf.ensemble.unstack({"a": normal(3, 2), "b": normal()})


# --- split and join ---


def ensemble(make, members):
    return bf.ensemble.stack([make(seed) for seed in range(members)])


def same_bits(left, right):
    assert torch.utils._pytree.tree_structure(left) == torch.utils._pytree.tree_structure(right)
    for a, b in zip(leaves_of(left), leaves_of(right), strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


@pytest.mark.parametrize("make", [tree, some_state, lambda seed: normal(2, seed=seed)], ids=["tree", "state", "leaf"])
@pytest.mark.parametrize(("members", "size", "count"), [(1, 1, 1), (5, 2, 3), (6, 3, 2), (4, 9, 1), (3, 1, 3)])
def test_join_is_the_inverse_of_split(make, members, size, count):
    whole = ensemble(make, members)
    chunks = bf.ensemble.split(whole, size)
    assert len(chunks) == count
    same_bits(bf.ensemble.join(chunks, members), whole)
    padded = [make(min(seed, members - 1)) for seed in range(count * size)]
    for i, chunk in enumerate(chunks):
        same_bits(chunk, bf.ensemble.stack(padded[i * size : (i + 1) * size]))


def test_a_vmapped_state_survives_the_round_trip():
    params, _ = bf.ensemble.init(mlp, range(5))
    together = (params, torch.vmap(learner().init)(params, bf.random.key(torch.arange(5))))
    again = bf.ensemble.join(bf.ensemble.split(together, 2), 5)
    assert again[1].fresh == together[1].fresh
    same_bits(again, together)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_chunks_are_contiguous_and_share_no_memory(size):
    leaf = normal(3, 4).t()
    kept = leaf.clone()
    chunks = bf.ensemble.split({"w": leaf, "same": normal(1, 3).expand(4, 3)}, size)
    memory = {chunk[name].untyped_storage().data_ptr() for chunk in chunks for name in chunk}
    assert len(memory) == 2 * len(chunks)
    assert all([part.is_contiguous() for chunk in chunks for part in chunk.values()])
    assert all([part.untyped_storage().nbytes() == size * 3 * 8 for chunk in chunks for part in chunk.values()])
    joined = bf.ensemble.join(chunks, 4)
    assert all([part.is_contiguous() for part in joined.values()])
    assert joined["w"].untyped_storage().nbytes() == 4 * 3 * 8
    leaf.zero_()
    assert torch.equal(joined["w"], kept)
    assert torch.equal(chunks[0]["w"][:2], kept[:2])
    chunks[0]["w"].fill_(7.0)
    assert torch.equal(joined["w"], kept)


def chunked(learn, step, members, size, steps=4):
    """An ensemble that has learned in chunks; the seeds of its members are 0, 1, …"""
    params, _ = bf.ensemble.init(mlp, range(members))
    state = torch.vmap(learn.init)(params, bf.random.key(torch.arange(members)))
    chunks = bf.ensemble.split((params, state), size)
    for _ in range(steps):
        for i, chunk in enumerate(chunks):
            chunks[i] = step(*chunk)
    return bf.ensemble.join(chunks, members)


def chunk_step(learn):
    shell, x, target = alone(mlp, 0), normal(10, 4).float(), normal(10, 3, seed=1).float()

    def step(params, state):
        grads = grad(lambda p: (functional_call(shell, p, (x,)) - target).square().mean())(params)
        params, _, state = learn(params, grads, state)
        return params, state

    return torch.vmap(step)


@pytest.fixture
def accelerated():
    bf.random.accelerate()
    yield
    bf.random.accelerate(False)


@pytest.mark.usefixtures("fresh_compiler", "accelerated")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_size_of_a_chunk_alone_fixes_the_numbers(compiled):
    learn = bf.chain(bf.crystallize, bf.sgd(), bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1))
    step, size = chunk_step(learn), 32
    if compiled:
        step = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        most = chunked(learn, step, 100, size)
        for members in (5, 32, 64):
            fewer = chunked(learn, step, members, size)
            for a, b in zip(leaves_of(fewer), leaves_of(most), strict=True):
                assert torch.equal(a, b[:members])
    born, _ = bf.ensemble.init(mlp, range(100))
    for name, weights in most[0].items():
        assert not torch.equal(weights, born[name])
        assert len({tuple(member.flatten().tolist()) for member in weights}) == 100


def test_chunks_learn_what_the_whole_ensemble_learns():
    learn = full_chain()
    whole = chunked(learn, chunk_step(learn), 21, 21)
    for size in (1, 4, 32):
        same_to(chunked(learn, chunk_step(learn), 21, size), whole, 1e-5)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, torch.tensor(2)])
def test_a_size_or_number_of_members_that_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match=re.escape(f"size is {value!r}; give a number of members")):
        bf.ensemble.split({"w": normal(4)}, value)
    with pytest.raises(TypeError, match=re.escape(f"members is {value!r}; give a number of members")):
        bf.ensemble.join([{"w": normal(4)}], value)


@pytest.mark.parametrize("value", [0, -1])
def test_a_size_or_number_of_members_below_one_is_refused(value):
    with pytest.raises(ValueError, match=f"size is {value}; give a number of members, at least 1"):
        bf.ensemble.split({"w": normal(4)}, value)
    with pytest.raises(ValueError, match=f"members is {value}; give a number of members, at least 1"):
        bf.ensemble.join([{"w": normal(4)}], value)


def test_leaves_of_chunks_without_a_common_member_axis_are_named():
    for uneven, count in (({"a": normal(3, 2), "b": normal(2, 3)}, 2), ({"a": normal(3, 2), "b": normal()}, "no")):
        with pytest.raises(ValueError, match=f"leaf 'b' has {count} members, the first leaf 3"):
            bf.ensemble.split(uneven, 2)
        with pytest.raises(ValueError, match=f"leaf 'b' has {count} members, the first leaf 3"):
            bf.ensemble.join([{"a": normal(3, 2), "b": normal(3, 3)}, uneven], 5)


@pytest.mark.parametrize("members", [4, 9])
def test_a_number_of_members_that_the_chunks_do_not_hold_is_refused(members):
    chunks = bf.ensemble.split({"w": normal(7, 2)}, 4)
    with pytest.raises(ValueError, match=f"members is {members}, but 2 chunks of 4 hold 5 to 8"):
        bf.ensemble.join(chunks, members)


def test_chunks_of_different_structure_size_shape_or_dtype_are_refused():
    chunk = {"w": normal(2, 3)}
    with pytest.raises(ValueError, match="chunks is empty"):
        bf.ensemble.join([], 1)
    with pytest.raises(ValueError, match="chunk 1 is a tree of another structure than chunk 0"):
        bf.ensemble.join([chunk, {"v": normal(2, 3)}], 4)
    for other in (normal(1, 3), normal(2, 4)):
        shapes = re.escape(f"leaf 'w' has shape {tuple(other.shape)} in chunk 1 and (2, 3) in chunk 0")
        with pytest.raises(ValueError, match=shapes):
            bf.ensemble.join([chunk, {"w": other}], 3)
    with pytest.raises(TypeError, match=r"leaf 'w' has dtype torch\.float32 in chunk 1"):
        bf.ensemble.join([chunk, {"w": normal(2, 3).float()}], 4)


# --- a member runs on alone ---

MEMBERS, TAKEN = 50, 7


def full_chain():
    return bf.chain(
        bf.crystallize,
        bf.adam(),
        bf.volume_dependent_lr,
        partial(bf.fuzzy_learning_rates, nu=0.3),
        bf.descend(0.02),
        bf.every(3, partial(bf.rejuvenate_weights, dre=20.0)),
    )


def same_to(left, right, tolerance):
    for a, b in zip(leaves_of(left), leaves_of(right), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(a, b)


def test_a_member_of_fifty_runs_as_its_seed_alone_and_runs_on_when_taken_out():
    shell, x, target = alone(mlp, 0), normal(10, 4), normal(10, 3, seed=1)
    learn, keys = full_chain(), bf.random.key(torch.arange(MEMBERS))

    def loss(params):
        return (functional_call(shell, params, (x,)) - target).square().mean()

    def step(params, state):
        params, _, state = learn(params, grad(loss)(params), state)
        return params, state

    def run(step, params, state, steps):
        for _ in range(steps):
            params, state = step(params, state)
        return params, state

    params, _ = bf.ensemble.init(lambda: mlp().double(), range(MEMBERS))
    half = run(torch.vmap(step), params, torch.vmap(learn.init)(params, keys), 50)
    whole = run(torch.vmap(step), *half, 50)

    born = {name: p.detach() for name, p in alone(mlp, TAKEN).double().named_parameters()}
    state = learn.init(born, bf.random.key(TAKEN))
    by_itself = run(step, born, state, 100)
    taken_out = run(step, *bf.ensemble.unstack(half)[TAKEN], 50)
    member = bf.ensemble.unstack(whole)[TAKEN]
    same_to(member, by_itself, 1e-12)
    same_to(member, taken_out, 1e-12)
    assert all([p.dtype == torch.float64 for p in member[0].values()])
    # the mechanisms were all at work
    assert member[1].step == 100
    count = member[1].slots["adam"]["count"]["0.weight"]
    assert count.min() < 100
    assert count.max() > count.min()
    rates, innate = member[1].plasticity["2.weight"], member[1].slots["fuzzy_learning_rates"]["innate"]["2.weight"]
    assert (rates < innate).any()
    assert (member[0]["0.weight"] - bf.ensemble.unstack(whole)[TAKEN + 1][0]["0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [1, 8, MEMBERS])
def test_noise_of_a_member_is_that_of_its_seed_alone_whatever_the_size_of_the_ensemble(size):
    keys, taken = bf.random.key(torch.arange(size)), min(TAKEN, size - 1)
    own = bf.random.key(taken)
    for draw in (bf.random.uniform, bf.random.normal):
        for dtype in (torch.float32, torch.float64):
            together = torch.vmap(partial(draw, shape=(3, 5), dtype=dtype))(keys)
            assert torch.equal(together[taken], draw(own, (3, 5), dtype=dtype))


def test_rates_of_a_member_are_those_of_its_seed_alone():
    params, _ = bf.ensemble.init(lambda: mlp().double(), range(MEMBERS))
    together = torch.vmap(full_chain().init)(params, bf.random.key(torch.arange(MEMBERS)))
    born = {name: leaf[TAKEN] for name, leaf in params.items()}
    own = full_chain().init(born, bf.random.key(TAKEN)).plasticity
    for path in ("0.weight", "2.weight"):
        assert own[path].unique().numel() == own[path].numel()
        assert torch.equal(together.plasticity[path][TAKEN], own[path])
