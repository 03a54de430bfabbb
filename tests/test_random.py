"""Random numbers: the right bits, the same bits everywhere, and bits that look random.

The oracle is Philox over Python's unbounded integers. Statistics are taken with fixed keys, so they pass always or
never. A p-value must exceed 1e-4 and a z-score stay below 5 in magnitude: a sound generator misses one of these bounds
in fewer than one choice of keys in 50.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from philox_oracle import key_of, oracle_block, oracle_fold_in, oracle_philox, oracle_words, pair_of, signed
from scipy import special, stats

from biofunc import BioState, philox, random
from biofunc.keys import fold_in_names, hash_name
from biofunc.noise import Noise, StepKeys, init_keys

SIZES = [1, 5, 7, 1000, 1001, 4099]  # most of them end inside a block, where tails go wrong
MILLIONS = 10**7
BOUND = 5  # in standard deviations
DRAWS = [random.uniform, random.normal]

EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]
uint64s = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1)
# offsets: many lie so close below a power that a draw carries into the high word, or wraps
below_powers = st.builds(lambda edge, below: edge - below, st.sampled_from([2**32, 2**63, 2**64]), st.integers(0, 6))
pairs = st.tuples(uint64s, uint64s | below_powers).map(lambda pair: (pair[0] % 2**64, pair[1] % 2**64))
data = uint64s | st.integers(-300, 300)


# Helpers


class Int64(int):
    """A number whose arithmetic raises where that of an int64 would overflow."""


def _checked(operation):
    def checked(self, other):
        result = operation(self, other)
        assert -(2**63) <= result < 2**63, f"{operation.__name__} of {int(self)} and {int(other)} overflows int64"
        return Int64(result)

    return checked


for _name in ["add", "sub", "mul", "and", "or", "xor", "lshift", "rshift"]:
    setattr(Int64, f"__{_name}__", _checked(getattr(int, f"__{_name}__")))


def in_a_loop(draw, keys, *args):
    return torch.stack([draw(key, *args) for key in keys])


def all_equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def chi_square_p(counts):
    """Two-sided p-value of equal frequencies; counts that are too even are as suspect as uneven ones."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2).sum() / expected
    return 2 * min(stats.chi2.sf(statistic, counts.size - 1), stats.chi2.cdf(statistic, counts.size - 1))


def assert_uncorrelated(streams):
    """All pairs of rows; r of independent rows has the standard deviation 1 / sqrt(n)."""
    r = np.corrcoef(streams)
    np.fill_diagonal(r, 0)
    assert np.abs(r).max() < BOUND / math.sqrt(streams.shape[1])


@pytest.fixture(scope="module")
def every_normal():
    """The normals of all 2^24 inputs that differ."""
    return philox.to_normal(torch.arange(2**24))


@pytest.fixture(scope="module")
def many_words():
    return philox.words(random.key(42), MILLIONS).numpy()


@pytest.fixture(scope="module")
def many_uniforms():
    return random.uniform(random.key(42), (MILLIONS,)).double().numpy()


@pytest.fixture(scope="module")
def many_normals():
    return random.normal(random.key(43), (MILLIONS,)).double().numpy()


# Published answers


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, block):
    counter, key, block = ([int(word, 16) for word in text.split()] for text in (counter, key, block))
    answer = philox.philox([torch.tensor(word) for word in key], [torch.tensor(word) for word in counter])
    assert [word.item() for word in answer] == block
    assert list(oracle_philox(key, counter)) == block


def test_key_split_fold_in_and_uniform_give_the_bits_of_torch():
    """Taken from torch.func._random of torch 2.15 on a CPU."""
    key = random.key(42)
    uniforms = [15396947, 16075067, 12538029, 4371415, 14360871, 12217597, 9394798, 5113595, 7078437, 8871371, 5074329]
    assert (random.uniform(key, (11,)) * 2**24).tolist() == uniforms
    assert random.split(key, 5)[0].tolist() == [8643895580192075859, 6287785766076502189]
    assert random.fold_in(key, 123456789012345).tolist() == [-3942825089595795260, 4590933830167097235]


@pytest.mark.skipif(torch.__version__ < (2, 15), reason="torch.func._random draws on the CPU from 2.15 on")
@given(pair=pairs, data=data, num=st.integers(1, 9))
@example(pair=(3, 2**64 - 1), data=-1, num=9)
def test_torch_itself_gives_these_bits(pair, data, num):
    from torch.func import _random as native

    key = key_of(pair)
    theirs = key.view(torch.uint64)
    assert torch.equal(random.split(key, num), native.split(theirs, num).view(torch.int64))
    assert torch.equal(random.fold_in(key, data), native.fold_in(theirs, data).view(torch.int64))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert torch.equal(random.uniform(key, (num,), dtype=dtype), native.uniform(theirs, num, dtype=dtype)), dtype


@pytest.mark.parametrize(
    ("name", "digest"), [("", 0xCBF29CE484222325), ("a", 0xAF63DC4C8601EC8C), ("foobar", 0x85944171F73967E8)]
)
def test_names_are_hashed_by_fnv_1a(name, digest):
    assert hash_name(name) == digest


# The oracle's answers


@given(pair=pairs, data=data, domain=st.integers(0, 1))
@example(pair=(2**64 - 1, 2**64 - 1), data=2**64 - 1, domain=1)
@example(pair=(2**63, 2**63), data=2**63, domain=0)
def test_blocks_and_keys_never_overflow_int64(pair, data, domain):
    """Overflow of signed integers is undefined in compiled kernels, even where eager code wraps."""
    seed, offset, low, high = (Int64(signed(pair[0])), Int64(signed(pair[1])), *map(Int64, philox.words_of(data)))
    words = philox.blocks(seed, offset, low, high, Int64(domain))
    assert words == list(oracle_block(pair, data, domain))
    for low in words:
        for high in words:
            assert philox._join(low, high) == signed(int(high) << 32 | int(low))


@given(seed=uint64s)
def test_key_holds_the_seed_modulo_2_64(seed):
    assert random.key(seed).dtype == torch.int64
    assert pair_of(random.key(seed)) == (seed % 2**64, 0)


@given(pair=pairs, num=st.integers(1, 9))
def test_split_is_the_oracle_and_folds_in_the_index(pair, num):
    children = random.split(key_of(pair), num)
    assert [pair_of(child) for child in children] == [oracle_fold_in(pair, i) for i in range(num)]
    assert torch.equal(children, torch.stack([random.fold_in(key_of(pair), i) for i in range(num)]))


@given(pair=pairs, data=data)
@example(pair=(3, 2**64 - 1), data=1)
@example(pair=(3, 2**32 - 1), data=2**32 - 1)
@example(pair=(3, 2**63), data=2**63)
def test_fold_in_of_an_integer_is_the_oracle(pair, data):
    assert pair_of(random.fold_in(key_of(pair), data)) == oracle_fold_in(pair, data)


@given(pair=pairs, data=data)
def test_fold_in_of_a_tensor_is_that_of_its_integer(pair, data):
    key, tensor = key_of(pair), torch.tensor(signed(data))
    assert torch.equal(random.fold_in(key, tensor), random.fold_in(key, data))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_fold_in_takes_every_signed_dtype(dtype):
    key = random.key(42)
    assert torch.equal(random.fold_in(key, torch.tensor(-3, dtype=dtype)), random.fold_in(key, -3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_fold_in_takes_every_unsigned_dtype(dtype):
    key, largest = random.key(42), torch.iinfo(dtype).max
    assert torch.equal(random.fold_in(key, torch.tensor(largest, dtype=dtype)), random.fold_in(key, largest))


@given(pair=pairs, name=st.text())
@example(pair=(42, 0), name="fc1.weight")
@example(pair=(42, 2**64 - 1), name="")
@example(pair=(42, 2**32 - 1), name="Gewicht/größer/重")
def test_fold_in_of_a_name_is_the_oracle(pair, name):
    assert pair_of(random.fold_in(key_of(pair), name)) == oracle_fold_in(pair, name)


@given(pair=pairs, name=st.text(), data=data)
def test_a_name_meets_no_integer(pair, name, data):
    """Not even the integer that is its hash, nor its own digits: names have a counter domain of their own."""
    key = key_of(pair)
    named = random.fold_in(key, name)
    assert not torch.equal(named, random.fold_in(key, data))
    assert not torch.equal(named, random.fold_in(key, hash_name(name)))
    assert not torch.equal(random.fold_in(key, str(data)), random.fold_in(key, data))


@given(pair=pairs, names=st.lists(st.text(), min_size=1, max_size=4))
def test_fold_in_of_many_names_is_that_of_each(pair, names):
    key = key_of(pair)
    assert torch.equal(fold_in_names(key, names), torch.stack([random.fold_in(key, name) for name in names]))


@given(pair=pairs, count=st.integers(1, 21))
@example(pair=(42, 2**64 - 2), count=21)
@example(pair=(42, 2**32 - 2), count=21)
def test_uniform_is_the_oracle(pair, count):
    words = oracle_words(pair, 2 * count)
    for dtype, expected in {
        torch.float32: [word % 2**24 / 2**24 for word in words[:count]],
        torch.float16: [word % 2**11 / 2**11 for word in words[:count]],
        torch.bfloat16: [word % 2**8 / 2**8 for word in words[:count]],
        torch.float64: [(words[2 * j] << 32 | words[2 * j + 1]) % 2**53 / 2**53 for j in range(count)],
    }.items():
        draw = random.uniform(key_of(pair), (count,), dtype=dtype)
        assert draw.dtype == dtype
        assert draw.tolist() == expected


@given(pair=pairs, count=st.integers(1, 21), p=st.floats(0, 1, width=32))
def test_bernoulli_is_the_oracle(pair, count, p):
    expected = [word % 2**24 / 2**24 < p for word in oracle_words(pair, count)]
    assert random.bernoulli(key_of(pair), p, (count,)).tolist() == expected
    assert random.bernoulli(key_of(pair), torch.full((count,), p)).tolist() == expected
    assert not random.bernoulli(key_of(pair), random.uniform(key_of(pair), (count,))).any()  # below, not equal


@given(pair=pairs, count=st.integers(1, 21))
def test_rademacher_is_the_oracle_and_the_sign_of_normal(pair, count):
    expected = [-1.0 if word >> 23 & 1 else 1.0 for word in oracle_words(pair, count)]
    assert random.rademacher(key_of(pair), (count,)).tolist() == expected
    assert random.normal(key_of(pair), (count,)).sign().tolist() == expected


@given(pair=pairs, count=st.integers(1, 21))
def test_normal_interpolates_between_quantiles(pair, count):
    """One value at a time: the tail q / 2^25 lies in one of 64 segments of its octave, and the rest is a line."""
    quantiles = [-special.ndtri(2**octave * (1 + s / 64) / 2**25) for octave in range(24) for s in range(64)] + [0.0]
    expected = []
    for word in oracle_words(pair, count):
        q = 2 * (word % 2**23) + 1
        octave = q.bit_length() - 1
        segment, rest = divmod(64 * (q - 2**octave) / 2**octave, 1)
        left, right = quantiles[64 * octave + int(segment)], quantiles[64 * octave + int(segment) + 1]
        expected.append((-1.0 if word >> 23 & 1 else 1.0) * (left + rest * (right - left)))
    draw = random.normal(key_of(pair), (count,)).tolist()
    assert draw == pytest.approx(expected, rel=2**-23, abs=2**-31)  # float32, and the 2^-32 of the table


@pytest.mark.parametrize("size", SIZES)
def test_words_are_the_oracle_at_every_size(size):
    pair = (0xDEADBEEF12345678, 2**32 - 3)
    assert philox.words(key_of(pair), size).tolist() == oracle_words(pair, size)


# Many keys at once


@given(batch=st.lists(pairs, min_size=2, max_size=4), num=st.integers(1, 5), data=data, name=st.text(max_size=5))
def test_batched_keys_derive_what_each_derives(batch, num, data, name):
    keys = key_of(*batch)
    children = random.split(keys, num)
    assert children.shape == (num, len(batch), 2)
    assert torch.equal(children, torch.stack([random.split(key, num) for key in keys], dim=1))
    for datum in (data, name, torch.tensor(signed(data))):
        assert torch.equal(random.fold_in(keys, datum), in_a_loop(random.fold_in, keys, datum))
    assert torch.equal(fold_in_names(keys, [name, "b"]), in_a_loop(fold_in_names, keys, [name, "b"]))


def test_fold_in_pairs_keys_with_the_elements_of_a_tensor():
    keys, data = random.split(random.key(42), 3), torch.tensor([5, -6, 2**40])
    each = torch.stack([random.fold_in(key, datum) for key, datum in zip(keys, data, strict=True)])
    assert torch.equal(random.fold_in(keys, data), each)
    assert torch.equal(random.fold_in(keys[0], torch.arange(4)), random.split(keys[0], 4))


@pytest.mark.parametrize("draw", [random.uniform, random.normal, random.rademacher])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_key_of_a_batch_starts_its_own_stream(draw, dtype):
    keys = random.split(random.key(42), 6).view(2, 3, 2)
    draws = draw(keys, (5, 7), dtype=dtype)
    assert draws.shape == (2, 3, 5, 7)
    for i in range(2):
        for j in range(3):
            assert torch.equal(draws[i, j], draw(keys[i, j], (5, 7), dtype=dtype))


def test_bernoulli_broadcasts_its_probabilities():
    keys, p = random.split(random.key(42), 3), torch.tensor([0.0, 0.3, 1.0])
    draws = random.bernoulli(keys, p)
    assert torch.equal(draws, in_a_loop(random.bernoulli, keys, p))
    assert torch.equal(draws, random.uniform(keys, (3,)) < p)
    assert torch.equal(random.bernoulli(keys[0], p, (4, 3)), random.uniform(keys[0], (4, 3)) < p)


def test_seed_tensors_give_the_keys_of_their_seeds():
    seeds = torch.tensor([[0, 1, -1], [42, 2**63 - 1, -(2**63)]])
    each = torch.stack([random.key(int(seed)) for seed in seeds.flatten()]).view(2, 3, 2)
    assert torch.equal(random.key(seeds), each)
    assert torch.equal(torch.vmap(random.key)(seeds.flatten()), each.view(6, 2))
    assert torch.equal(random.key(seeds[1, 0]), random.key(42))


def test_a_seed_has_one_key_signed_or_not():
    assert torch.equal(random.key(-1), random.key(2**64 - 1))
    assert torch.equal(random.key(-(2**63)), random.key(2**63))


@pytest.mark.parametrize("seed", [42, torch.tensor([42, 43])])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_key_takes_a_device(seed, device):
    assert random.key(seed, device=device).device == torch.device("cpu")
    assert torch.equal(random.key(seed, device=device), random.key(seed))


@pytest.mark.parametrize("draw", [random.uniform, random.normal, random.rademacher])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_one_or_no_number_are_kept(draw, shape, dtype):
    key, keys = random.key(42), random.split(random.key(42), 2)
    assert draw(key, shape, dtype=dtype).shape == shape
    assert draw(keys, shape, dtype=dtype).shape == (2, *shape)
    assert draw(keys[:0], shape, dtype=dtype).shape == (0, *shape)
    assert random.bernoulli(key, 0.5, shape).shape == shape
    assert torch.equal(draw(key), draw(key, (1,))[0])


# The normal distribution, all of it


def test_normals_are_quantiles(every_normal):
    """Input w < 2^23 stands for the upper tail (2 w + 1) / 2^25."""
    tails = (2 * np.arange(2**23) + 1) / 2**25
    z = every_normal[: 2**23].double().numpy()
    assert np.abs(z + special.ndtri(tails)).max() < 1.3e-5
    assert (np.diff(z) <= 0).all()
    assert z.min() > 0


def test_normals_are_symmetric(every_normal):
    assert torch.equal(every_normal[2**23 :], -every_normal[: 2**23])


def test_normals_have_the_moments_of_the_normal_distribution(every_normal):
    z = every_normal.double().numpy()
    variance = np.square(z).mean()
    assert abs(z.mean()) < 1e-12
    assert abs(variance - 1) < 7e-6
    assert abs((z**4).mean() / variance**2 - 3) < 3e-5
    assert 5.41 < np.abs(z).max() < 5.42


def test_normals_ignore_the_high_byte_of_a_word(many_words):
    words = torch.from_numpy(many_words[:10_000])
    assert torch.equal(philox.to_normal(words), philox.to_normal(words & 0xFFFFFF))


def test_the_table_of_normals_is_the_same_on_every_platform():
    """It is made by the platform's log and sqrt; a last bit that differs in one of 3072 numbers shows here."""
    table = philox._make_normal_table()
    pair = torch.stack([table >> philox._FALL_BITS, table & ((1 << philox._FALL_BITS) - 1)])
    digest = hashlib.sha256(pair.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "4d22692a4bd465ab0731693ed3f9b70b40fa04b09d4beee254fa2ac81c82afb5"


def test_normals_are_the_same_on_every_platform(every_normal):
    digest = hashlib.sha256(every_normal.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "04c45c35b962acb9c60dac0d7197c8f2b9d1dc8e44cc4677221ef93cae112a14"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_normals_of_other_dtypes_are_float32_normals_cast(dtype):
    key = random.key(42)
    draw = random.normal(key, (1001,), dtype=dtype)
    assert draw.dtype == dtype
    assert torch.equal(draw, random.normal(key, (1001,)).to(dtype))


# The same bits in a loop, under vmap, under grad and compiled


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("members", [1, 3, 50])
def test_vmap_gives_the_bits_of_a_loop(draw, size, members):
    keys = random.split(random.key(42), members)
    loop = in_a_loop(draw, keys, (size,))
    assert torch.equal(torch.vmap(lambda key: draw(key, (size,)))(keys), loop)
    assert torch.equal(draw(keys, (size,)), loop)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("size", SIZES)
def test_a_longer_draw_begins_with_the_shorter_one(draw, size):
    key = random.key(42)
    assert torch.equal(draw(key, (size,)), draw(key, (5000,))[:size])
    assert torch.equal(draw(key, (size, 3)), draw(key, (3 * size,)).view(size, 3))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("size", SIZES)
def test_nested_vmap_gives_the_bits_of_a_loop(draw, size):
    keys = random.split(random.key(42), 6).view(2, 3, 2)
    loop = torch.stack([in_a_loop(draw, row, (size,)) for row in keys])
    assert torch.equal(torch.vmap(torch.vmap(lambda key: draw(key, (size,))))(keys), loop)
    across = torch.vmap(torch.vmap(lambda key: draw(key, (size,))), in_dims=1)(keys)
    assert torch.equal(across, loop.transpose(0, 1))


def test_vmap_derives_the_keys_of_a_loop():
    keys, steps = random.split(random.key(42), 3), torch.tensor([0, 7, -1])
    folded = torch.stack([random.fold_in(key, step) for key, step in zip(keys, steps, strict=True)])
    assert torch.equal(torch.vmap(random.fold_in)(keys, steps), folded)
    assert torch.equal(torch.vmap(random.split)(keys), in_a_loop(random.split, keys))
    names = ["a", "b"]
    by_name = torch.vmap(lambda key: fold_in_names(key, names))(keys)
    assert torch.equal(by_name, in_a_loop(fold_in_names, keys, names))


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("size", SIZES)
def test_noise_inside_a_gradient_has_the_same_bits(draw, size):
    """The gradient of noise * w is the noise."""
    keys = random.split(random.key(42), 3)
    gradient = torch.func.grad(lambda w, key: (w * draw(key, w.shape)).sum())
    ones = torch.ones(size)
    assert torch.equal(gradient(ones, keys[0]), draw(keys[0], (size,)))
    assert torch.equal(torch.vmap(gradient, in_dims=(None, 0))(ones, keys), in_a_loop(draw, keys, (size,)))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_vmap_gives_the_bits_of_a_loop_at_every_shape():
    """One graph, of symbolic shapes, as the compiler makes it when a second shape comes along."""

    def draws(keys, weight):
        return torch.vmap(lambda key: tuple(draw(key, weight.shape) for draw in DRAWS))(keys)

    compiled = torch.compile(draws, fullgraph=True, dynamic=True)
    for members, size in [(3, 1001), (50, 4099), (7, 7)]:
        keys = random.split(random.key(members), members)
        loop = [in_a_loop(draw, keys, (size,)) for draw in DRAWS]
        assert all_equal(compiled(keys, torch.zeros(size)), loop)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_nested_vmap_of_gradients_gives_the_bits_of_a_loop():
    """One graph of fixed shapes; the keys are derived inside, from a name and a step that is a tensor."""

    def product(key, step):
        key = random.fold_in(random.fold_in(key, "rule"), step)
        return random.uniform(key, (1001,)) * random.normal(key, (1001,))

    def member(key, step):
        return torch.func.grad(lambda w: (w * product(key, step)).sum())(torch.ones(1001))

    keys, step = random.split(random.key(42), 6).view(2, 3, 2), torch.tensor(11)
    nested = torch.vmap(torch.vmap(member, in_dims=(0, None)), in_dims=(0, None))
    loop = torch.stack([in_a_loop(product, row, step) for row in keys])
    assert torch.equal(torch.compile(nested, fullgraph=True)(keys, step), loop)


# Streams of many lengths in one call


RAGGED = [0, 1, 5, 4, 1001, 0, 7, 4099]
AHEAD = [0, 3, 0, 2, 1, 5, 0, 7]
KINDS = {"uniform": philox.to_uniform, "normal": philox.to_normal}


def ragged(keys, kind):
    return philox.ragged_draws(list(keys), AHEAD, RAGGED, kind)


def one_by_one(keys, kind):
    """From the stream of each key, the numbers behind the blocks to leave out."""
    streams = [philox.words(key, 4 * ahead + count) for key, ahead, count in zip(keys, AHEAD, RAGGED, strict=True)]
    return [KINDS[kind](words[4 * ahead :]) for words, ahead in zip(streams, AHEAD, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_draws_are_those_of_each_stream(kind):
    keys = random.split(random.key(42), len(RAGGED))
    assert all_equal(ragged(keys, kind), one_by_one(keys, kind))


@given(streams=st.lists(st.tuples(pairs, st.integers(0, 13), st.integers(0, 2**33)), min_size=1, max_size=5))
def test_ragged_draws_are_the_oracle(streams):
    """Also where the counter runs over 2^32 and 2^64."""
    keys, counts, aheads = [key_of(pair) for pair, _, _ in streams], *zip(*[row[1:] for row in streams], strict=True)
    drawn = philox.ragged_draws(keys, aheads, counts, "uniform")
    for ((seed, offset), count, ahead), values in zip(streams, drawn, strict=True):
        words = oracle_words((seed, (offset + ahead) % 2**64), count)
        assert values.tolist() == [word % 2**24 / 2**24 for word in words]


def test_long_draws_are_made_piece_by_piece():
    """Eagerly the generator works on pieces that fit the cache."""
    count = 4 * philox.CACHED + 4099
    key, whole = random.key(7), philox.to_normal(philox.words(random.key(7), count))
    (drawn,) = philox.ragged_draws([key], [0], [count], "normal")
    assert torch.equal(drawn, whole)
    assert torch.equal(random.normal(key, (count,)), whole)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_rows_are_as_wide_as_an_eighth_of_waste_allows(sizes):
    width = philox._width(sizes)
    blocks = {w: sum([-(-size // w) * w for size in sizes]) for w in (8, width, 2 * width)}
    assert blocks[width] <= blocks[8] * 9 / 8
    assert width == 1024 or blocks[2 * width] > blocks[8] * 9 / 8


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_draws_under_vmap_are_those_of_a_loop(kind):
    keys = random.split(random.key(42), 3)
    stacked = torch.vmap(lambda key: ragged(random.split(key, len(RAGGED)), kind))(keys)
    for member, key in enumerate(keys):
        each = one_by_one(random.split(key, len(RAGGED)), kind)
        assert all_equal([stream[member] for stream in stacked], each)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_ragged_draws_are_those_of_each_stream(kind):
    keys = random.split(random.key(42), len(RAGGED))
    compiled = torch.compile(lambda keys: ragged(keys, kind), fullgraph=True)
    assert all_equal(compiled(keys), one_by_one(keys, kind))


# Noise of a rule


LEAVES = {
    "fc1.weight": torch.zeros(5, 3),
    "fc1.bias": torch.zeros(4),
    "empty": torch.zeros(0, 2),
    "scale": torch.zeros(()),
    "double": torch.zeros(7, dtype=torch.float64),
}


def leaf_keys(key=None):
    key = random.key(42) if key is None else key
    return {path: random.fold_in(key, path) for path in LEAVES}


def test_the_first_kind_is_what_the_key_of_a_leaf_gives_on_its_own():
    (normals,) = Noise(leaf_keys()).draw(LEAVES, "normal")
    (uniforms,) = Noise(leaf_keys()).draw(LEAVES, "uniform")
    (coins,) = Noise(leaf_keys()).draw(LEAVES, "coin")
    assert list(normals) == list(uniforms) == list(coins) == list(LEAVES)
    for path, key in leaf_keys().items():
        shape, dtype = LEAVES[path].shape, LEAVES[path].dtype
        assert normals[path].dtype == uniforms[path].dtype == coins[path].dtype == dtype
        assert torch.equal(normals[path], random.normal(key, shape, dtype=dtype))
        assert torch.equal(uniforms[path], random.uniform(key, shape).to(dtype))
        assert torch.equal(coins[path], random.uniform(key).to(dtype))


def test_each_further_kind_starts_at_the_next_fresh_block():
    kinds = ["normal", "uniform", "coin", "normal", "uniform"]
    draws = Noise(leaf_keys()).draw(LEAVES, *kinds)
    for path, key in leaf_keys().items():
        used = 0
        for kind, drawn in zip(kinds, draws, strict=True):
            shape = () if kind == "coin" else LEAVES[path].shape
            on_its_own = random.normal if kind == "normal" else random.uniform
            rest = key + torch.tensor([0, used])  # the stream from this block on
            assert torch.equal(drawn[path], on_its_own(rest, shape).to(LEAVES[path].dtype))
            used += math.ceil(math.prod(shape) / 4)


@given(paths=st.lists(st.sampled_from(sorted(LEAVES)), unique=True, min_size=1))
def test_noise_of_a_leaf_does_not_depend_on_the_other_leaves(paths):
    everything = Noise(leaf_keys()).draw(LEAVES, "normal", "uniform", "coin")
    some = Noise(leaf_keys()).draw({path: LEAVES[path] for path in paths}, "normal", "uniform", "coin")
    for full, part in zip(everything, some, strict=True):
        assert list(part) == paths
        assert all_equal(list(part.values()), [full[path] for path in paths])


def test_noise_of_no_leaves_is_no_noise():
    assert Noise(leaf_keys()).draw({}, "normal", "coin") == [{}, {}]


def test_noise_does_not_depend_on_the_dtype_of_a_leaf():
    key = random.key(42)
    for kind in ("normal", "uniform", "coin"):
        (single,) = Noise({"w": key}).draw({"w": torch.zeros(7)}, kind)
        (double,) = Noise({"w": key}).draw({"w": torch.zeros(7, dtype=torch.float64)}, kind)
        assert torch.equal(single["w"].double(), double["w"])


def test_noise_under_vmap_is_that_of_a_loop():
    keys = random.split(random.key(42), 3)
    batch = torch.vmap(lambda key: Noise(leaf_keys(key)).draw(LEAVES, "normal", "coin"))(keys)
    for member, key in enumerate(keys):
        for stacked, alone in zip(batch, Noise(leaf_keys(key)).draw(LEAVES, "normal", "coin"), strict=True):
            assert all_equal([stacked[path][member] for path in LEAVES], [alone[path] for path in LEAVES])


@pytest.mark.parametrize("first", [lambda noise: noise.draw(LEAVES, "normal"), lambda noise: noise.keys(LEAVES)])
@pytest.mark.parametrize("second", [lambda noise: noise.draw(LEAVES, "normal"), lambda noise: noise.keys(LEAVES)])
def test_a_rule_draws_once(first, second):
    noise = Noise(leaf_keys())
    first(noise)
    with pytest.raises(RuntimeError, match=r"ask for all kinds in one noise\.draw"):
        second(noise)


def test_keys_of_a_rule_come_from_names_step_and_path():
    state = BioState(random.key(42), torch.tensor(3))
    names, paths = ["volume", "fuzzy"], list(LEAVES)
    at_step, at_init = StepKeys(state, names, paths), {name: init_keys(state, name, paths) for name in names}
    for name in names:
        of_rule = random.fold_in(state.key, name)
        for path in paths:
            assert torch.equal(at_step[name][path], random.fold_in(random.fold_in(of_rule, 3), path))
            assert torch.equal(at_init[name][path], random.fold_in(random.fold_in(of_rule, "init"), path))
        assert torch.equal(Noise(at_step[name]).keys(LEAVES)["fc1.bias"], at_step[name]["fc1.bias"])


def test_keys_of_no_rules_or_no_leaves_are_none():
    state = BioState(random.key(42), torch.tensor(3))
    assert StepKeys(state, ["volume"], [])["volume"] == {}
    assert init_keys(state, "volume", []) == {}


# Statistics of one stream


def test_uniforms_have_the_moments_of_the_uniform_distribution(many_uniforms):
    """Variances 1/12 of u and 1/180 of (u - 1/2)^2; the half step 2^-25 of the mean is far below the bound."""
    assert many_uniforms.min() >= 0
    assert many_uniforms.max() < 1
    assert abs(many_uniforms.mean() - 1 / 2) < BOUND * math.sqrt(1 / 12 / MILLIONS)
    assert abs(np.square(many_uniforms - 1 / 2).mean() - 1 / 12) < BOUND * math.sqrt(1 / 180 / MILLIONS)


def test_uniforms_follow_the_uniform_distribution(many_uniforms):
    """Steps of 2^-24 move the distance by 6e-8; a distance that matters is 5e-4."""
    assert stats.kstest(many_uniforms, "uniform").pvalue > 1e-4


def test_normals_have_the_moments_of_the_normal_distribution_in_a_draw(many_normals):
    """Standard deviations of the first four sample moments of n normals; the table's own bias is 100 times smaller."""
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((many_normals**power).mean() - moment) < BOUND * math.sqrt(variance / MILLIONS)


def test_normals_follow_the_normal_distribution(many_normals):
    """2^24 values within 1.3e-5 of the quantiles move the distance by less than 5e-6; one that matters is 5e-4."""
    assert stats.kstest(many_normals, "norm").pvalue > 1e-4


def test_the_bits_of_a_word_are_balanced(many_words):
    ones = np.array([(many_words >> bit & 1).sum() for bit in range(32)])
    z = (2 * ones - MILLIONS) / math.sqrt(MILLIONS)
    assert np.abs(z).max() < BOUND
    assert 1e-4 < stats.chi2.sf(np.square(z).sum(), 32) < 1 - 1e-4


def test_the_bits_of_a_word_are_independent_of_one_another(many_words):
    bits = many_words[: 2**18, None] >> np.arange(32) & 1
    assert_uncorrelated(bits.T.astype(float))


@pytest.mark.parametrize("shift", [0, 8, 16])
def test_sixteen_bits_of_a_word_take_all_values_equally_often(many_words, shift):
    assert chi_square_p(np.bincount(many_words >> shift & 0xFFFF, minlength=2**16)) > 1e-4


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_of_neighbouring_words_take_all_pairs_equally_often(many_words, shift):
    """Pairs inside a block and across blocks; they do not overlap, so the counts are independent."""
    for start in (0, 1, 3):
        left, right = (many_words[start:-1:2] >> shift & 0xFF), (many_words[start + 1 :: 2] >> shift & 0xFF)
        count = min(left.size, right.size)
        assert chi_square_p(np.bincount(left[:count] << 8 | right[:count], minlength=2**16)) > 1e-4


def test_words_repeat_as_often_as_birthdays_do(many_words):
    """2^20 of 2^32 values: 128 pairs coincide, give or take 11; a permutation of 32 bits would have none."""
    repeats = 2**20 - np.unique(many_words[: 2**20]).size
    assert abs(repeats - 128) < BOUND * math.sqrt(128)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 1000, 4096])
def test_a_stream_does_not_remember(many_uniforms, many_normals, lag):
    """r of independent numbers has the standard deviation 1 / sqrt(n)."""
    for draw, mean, variance in [(many_uniforms, 1 / 2, 1 / 12), (many_normals, 0, 1)]:
        r = ((draw[:-lag] - mean) * (draw[lag:] - mean)).mean() / variance
        assert abs(r) < BOUND / math.sqrt(MILLIONS - lag)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
def test_bernoulli_is_true_with_its_probability(p):
    n = 10**6
    trues = random.bernoulli(random.key(42), p, (n,)).sum().item()
    assert abs(trues - n * p) <= BOUND * math.sqrt(n * p * (1 - p))  # at 0 and 1 exactly


def test_rademacher_is_balanced():
    n = 10**6
    draw = random.rademacher(random.key(42), (n,))
    assert draw.unique().tolist() == [-1, 1]
    assert abs(draw.sum().item()) < BOUND * math.sqrt(n)


# Statistics across streams


def _leaf_family():
    """Two rules, two steps, two leaves."""
    states = [BioState(random.key(42), torch.tensor(step)) for step in (0, 1)]
    noises = [StepKeys(state, ["volume", "fuzzy"], ["fc1.weight", "fc2.weight"]) for state in states]
    return torch.stack([key for noise in noises for name in ("volume", "fuzzy") for key in noise[name].values()])


def _generations():
    keys = [random.key(42)]
    for _ in range(7):
        keys.append(random.fold_in(keys[-1], 0))
    return torch.stack(keys)


FAMILIES = {
    "neighbouring seeds": lambda: random.key(torch.arange(8)),
    "seeds of one bit": lambda: random.key(1 << torch.arange(64)),
    "seeds of both signs": lambda: random.key(torch.arange(-4, 4)),
    "children of a split": lambda: random.split(random.key(42), 8),
    "first children of neighbouring seeds": lambda: random.split(random.key(torch.arange(8)))[0],
    "generations": _generations,
    "steps": lambda: random.fold_in(random.key(42), torch.arange(10**6, 10**6 + 8)),
    "names": lambda: fold_in_names(random.key(42), ["a", "b", "aa", "ab", "fc1.weight", "fc1.bias", "", "1"]),
    "names and integers": lambda: torch.stack([random.fold_in(random.key(42), d) for d in (0, "0", 1, "1", 2, "2")]),
    "rules, steps and leaves": _leaf_family,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_of_related_keys_are_uncorrelated(family):
    """By their words, which the high bits rule; by their uniforms, the low 24 bits; and by their normals."""
    keys, n = FAMILIES[family](), 2**16
    assert len({pair_of(key) for key in keys}) == len(keys)
    assert_uncorrelated(philox.words(keys, n).double().numpy())
    for draw in DRAWS:
        assert_uncorrelated(draw(keys, (n,)).double().numpy())


def test_first_numbers_of_related_keys_are_random():
    """A draw of a few numbers from each of many keys is what an ensemble sees at its first step."""
    n = 10**6
    for keys in (random.key(torch.arange(n)), random.split(random.key(42), n)):
        first = random.uniform(keys, (2,)).double().numpy()
        assert stats.kstest(first[:, 0], "uniform").pvalue > 1e-4
        assert_uncorrelated(np.stack([first[:-1, 0], first[1:, 0], first[:-1, 1], first[1:, 1]]))


def test_kinds_and_leaves_of_one_draw_are_uncorrelated():
    leaves = {"a": torch.zeros(2**17), "b": torch.zeros(2**17)}
    kinds = Noise({path: random.fold_in(random.key(42), path) for path in leaves}).draw(leaves, "normal", "uniform")
    assert_uncorrelated(np.stack([draw.numpy() for kind in kinds for draw in kind.values()]).astype(float))


# Bad input


USES_OF_A_KEY = {
    "split": random.split,
    "fold_in": lambda key: random.fold_in(key, 1),
    "fold_in of a name": lambda key: random.fold_in(key, "a"),
    "uniform": random.uniform,
    "normal": random.normal,
    "bernoulli": random.bernoulli,
    "rademacher": random.rademacher,
}


@pytest.mark.parametrize("use", USES_OF_A_KEY.values(), ids=USES_OF_A_KEY.keys())
@pytest.mark.parametrize(
    "key",
    [
        42,
        None,
        [42, 0],
        np.array([42, 0]),
        torch.tensor([42.0, 0.0]),
        torch.tensor([42, 0], dtype=torch.int32),
        torch.tensor([42, 0], dtype=torch.uint64),
        torch.tensor(42),
        torch.tensor([42]),
        torch.tensor([42, 0, 0]),
        torch.zeros(2, 3, dtype=torch.int64),
    ],
    ids=repr,
)
def test_what_is_no_key_is_refused_with_what_would_be_one(use, key):
    with pytest.raises(TypeError, match=r"key is int64 of shape \(\.\.\., 2\), made by biofunc\.random\.key\(seed\)"):
        use(key)


@pytest.mark.parametrize("seed", [True, 1.0, "1", None, [1]])
def test_a_seed_is_an_integer(seed):
    with pytest.raises(TypeError, match="a seed must be an integer or an int64 tensor"):
        random.key(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint64, torch.bool])
def test_a_seed_tensor_is_int64(dtype):
    with pytest.raises(TypeError, match="a seed tensor must be int64"):
        random.key(torch.tensor(1, dtype=dtype))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_fits_64_bits(seed):
    with pytest.raises(ValueError, match=r"must lie in \[-2\^63, 2\^64\)"):
        random.key(seed)


@pytest.mark.parametrize("num", [0, -1])
def test_a_split_has_a_child(num):
    with pytest.raises(ValueError, match="must be at least 1"):
        random.split(random.key(42), num)


@pytest.mark.parametrize(
    "data",
    [1.0, True, None, b"a", [1], torch.tensor(1.0), torch.tensor(True), torch.tensor(1j)],
    ids=repr,
)
def test_fold_in_takes_integers_and_names(data):
    with pytest.raises(TypeError, match="fold_in takes integers, names"):
        random.fold_in(random.key(42), data)


@pytest.mark.parametrize("p", [-0.1, 1.1, -math.inf, math.nan, 2])
def test_a_probability_lies_in_0_1(p):
    with pytest.raises(ValueError, match=r"a probability lies in \[0, 1\]"):
        random.bernoulli(random.key(42), p, (3,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_uniforms_and_normals_are_floating(dtype):
    with pytest.raises(TypeError, match="uniform draws float32, float64, float16 or bfloat16"):
        random.uniform(random.key(42), (3,), dtype=dtype)
    with pytest.raises(TypeError, match="normal draws floating dtypes"):
        random.normal(random.key(42), (3,), dtype=dtype)


# --- what is refused ---


def test_a_misspelt_kind_of_noise_is_refused():
    leaves = {"a": torch.zeros(2)}
    for kinds in (("gaussian",), ("normal", "unifrom"), ()):
        with pytest.raises(ValueError, match="draw one or more of uniform, normal, coin"):
            Noise({"a": random.key(0)}).draw(leaves, *kinds)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_signs_need_a_dtype_that_holds_minus_one(dtype):
    with pytest.raises(TypeError, match="cannot hold -1"):
        random.rademacher(random.key(0), (4,), dtype=dtype)


@pytest.mark.parametrize("num", [2.0, True, "2"])
def test_the_number_of_keys_is_an_integer(num):
    with pytest.raises(TypeError, match="num is"):
        random.split(random.key(0), num)


# --- gamma and beta ---


@pytest.mark.parametrize("concentration", [0.05, 0.5, 1.0, 1.5, 6.25, 100.0, 1e4])
def test_gammas_follow_their_law(concentration):
    """10^6 draws on a fixed key; p > 1e-4, and mean and variance within 5 standard errors."""
    draws = random.gamma(random.key(3), concentration, (10**6,), dtype=torch.float64)
    assert stats.kstest(draws.numpy(), stats.gamma(concentration).cdf).pvalue > 1e-4
    assert abs(draws.mean() - concentration) < 5 * (concentration / 1e6) ** 0.5
    fourth = 3 * concentration**2 + 6 * concentration  # central moment
    assert abs(draws.var() - concentration) < 5 * ((fourth - concentration**2) / 1e6) ** 0.5


@pytest.mark.parametrize(("a", "b"), [(0.5, 2.0), (6.25, 6.25), (1.0, 1.0), (2.0, 30.0)])
def test_betas_follow_their_law(a, b):
    draws = random.beta(random.key(4), a, b, (10**6,), dtype=torch.float64)
    assert stats.kstest(draws.numpy(), stats.beta(a, b).cdf).pvalue > 1e-4


def test_betas_of_tiny_concentrations_are_numbers():
    draws = random.beta(random.key(5), 1e-3, 1e-3, (10**4,), dtype=torch.float64)
    assert ((draws >= 0) & (draws <= 1)).all()
    assert abs(draws.mean() - 0.5) < 5 * 0.5 / 100


def test_gamma_and_beta_are_the_same_in_a_loop_under_vmap_and_in_other_dtypes():
    keys, concentrations = random.split(random.key(0), 3), torch.tensor([0.5, 1.0, 7.0])
    for draw in (lambda k, c: random.gamma(k, c, (5,)), lambda k, c: random.beta(k, c, 2.0, (5,))):
        looped = torch.stack([draw(k, c) for k, c in zip(keys, concentrations, strict=True)])
        assert torch.equal(torch.vmap(draw)(keys, concentrations), looped)
    single, double = [random.gamma(keys[0], 2.0, (100,), dtype=dtype) for dtype in (torch.float32, torch.float64)]
    assert torch.equal(single, double.float())
    assert random.gamma(keys[0], concentrations).shape == random.beta(keys[0], concentrations, 1.0).shape == (3,)


def test_a_gamma_round_rejects_less_than_a_twentieth():
    """0.049^7 < 1e-9 is the chance that all rounds fail; the first round is the only one that this allows to see."""
    count = 10**6
    for concentration in (1.0, 1.3, 3.0, 100.0):
        words = philox.words(random.split(random.key(1), 8)[0], 2 * count)
        x, d = philox.to_normal(words[:count]).double(), concentration - 1 / 3
        v = (1 + x / (9 * d) ** 0.5) ** 3
        log_u = ((words[count:].double() + 0.5) / 2**32).log()
        accepted = (v > 0) & (log_u < x * x / 2 + d * (1 - v + v.clamp(min=1e-300).log()))
        assert 1 - accepted.double().mean() < 0.049


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda k: random.gamma(k, 0.0), ValueError, r"concentration is 0.0; a concentration is positive"),
        (lambda k: random.beta(k, 1.0, -2.0), ValueError, r"b is -2.0; a concentration is positive"),
        (lambda k: random.beta(k, float("nan"), 1.0), ValueError, r"a is nan; a concentration is positive"),
        (lambda k: random.gamma(k, 1.0, dtype=torch.int64), TypeError, "draw floating dtypes"),
        (lambda k: random.gamma(3, 1.0), TypeError, "key is 3; a key is int64"),
    ],
)
def test_gamma_and_beta_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call(random.key(0))


def test_normals_are_the_same_where_vmap_knows_no_views(monkeypatch):
    words = torch.arange(2**24)
    expected = philox.to_normal(words)
    monkeypatch.setattr(philox, "_VMAPS_VIEWS", False)  # as before torch 2.13
    assert torch.equal(philox.to_normal(words), expected)
