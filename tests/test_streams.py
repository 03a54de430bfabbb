"""Streams that meet: the bound of docs/numerics.md computed from its parts, and that derived keys behave as it assumes.

A key is the 128 bits of a Philox block. What a reduced key does, of which only some bits are looked at, shows whether
the 128 bits behave like those of a random function: the reduced keys must meet as often as birthdays do.
"""

import math
import pathlib

import numpy as np
import pytest
import torch

from biofunc import random
from biofunc.keys import fold_in_names, hash_name

MEMBERS, STEPS, LEAVES, RULES = 10**6, 10**6, 10**3, 10
DOCS = pathlib.Path(__file__).parents[1] / "docs" / "numerics.md"


def birthday(number, bits):
    """Upper bound of the probability that any two of so many random keys of so many bits are equal."""
    return number * (number - 1) / 2 / 2**bits


def overlap(number, blocks):
    """The same for two streams of so many blocks that share a counter: equal seeds, offsets so few blocks apart."""
    return number * (number - 1) / 2 * (2 * blocks - 1) / 2**128


@pytest.mark.parametrize(
    ("what", "bound", "stated"),
    [
        ("keys of leaves", birthday(MEMBERS * STEPS * LEAVES, 128), 1.5e-9),
        ("keys of steps and rules", birthday(MEMBERS * STEPS * RULES, 128) + birthday(MEMBERS * RULES, 128), 1.5e-13),
        ("streams of 10^3 blocks", overlap(MEMBERS * STEPS * LEAVES, 10**3), 2.9e-6),
        ("streams of 10^6 blocks", overlap(MEMBERS * STEPS * LEAVES, 10**6), 2.9e-3),
        ("names of leaves", birthday(LEAVES, 64), 2.7e-14),
        ("names of rules", birthday(RULES, 64), 2.4e-18),
    ],
)
def test_the_bounds_of_the_page_follow_from_their_parts(what, bound, stated):
    assert f"{bound:.1e}" == f"{stated:.1e}"  # to the two digits of the page
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| {what} "))
    assert f"| {stated:.1e} |".replace("e-0", "e-") in row


@pytest.fixture(scope="module")
def keys():
    """2^21 keys as rules get them: 128 members, steps and leaves each, as pairs of unsigned 64-bit numbers."""
    of_rule = random.fold_in(random.key(torch.arange(128)), "rejuvenate_weights")
    of_step = torch.stack([random.fold_in(of_rule, step) for step in range(128)], 1)
    of_leaf = fold_in_names(of_step, [f"layers.{i}.weight" for i in range(128)])
    return of_leaf.reshape(-1, 2).numpy().view(np.uint64)


def test_the_keys_of_a_run_are_distinct(keys):
    assert len(keys) == 2**21
    for half in keys.T:  # even a half, of 64 bits: 2^41 pairs meet in one with a probability of 1e-7
        assert (np.diff(np.sort(half)) > 0).all()


@pytest.mark.parametrize("shift", [0, 9, 23, 31, 46])
def test_reduced_keys_meet_as_often_as_birthdays_do(keys, shift):
    """18 bits of either half, wherever they are taken from: 32 of 2^41 pairs meet in 36 bits, give or take 5.7."""
    seed, offset = (keys >> np.uint64(shift) & np.uint64(2**18 - 1)).T
    _, counts = np.unique(seed << np.uint64(18) | offset, return_counts=True)
    pairs = int((counts * (counts - 1) // 2).sum())
    expected = birthday(2**21, 36)
    assert abs(pairs - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("shift", [0, 20, 40])
def test_reduced_streams_overlap_as_often_as_the_bound_says(keys, shift):
    """Seeds and offsets of 20 bits each, streams of 16 blocks: 2^41 pairs, 31 of 2^40 places: 62, give or take 7.9."""
    seed, offset = (keys >> np.uint64(shift) & np.uint64(2**20 - 1)).T
    places = np.sort(seed << np.uint64(20) | offset)
    pairs = 0
    for ahead in range(1, 6):  # in order, a stream that overlaps is one of the next few
        same_seed = places[ahead:] >> np.uint64(20) == places[:-ahead] >> np.uint64(20)
        pairs += int((same_seed & (places[ahead:] - places[:-ahead] < 16)).sum())
    expected = overlap(2**21, 16) * 2**88
    assert abs(pairs - expected) < 5 * math.sqrt(expected)


def test_children_of_one_key_never_meet():
    """The block is a bijection of its counter: no birthday among the children of a key, steps of a rule for one."""
    children = random.split(random.key(7), 2**18).numpy().view(np.uint64)
    assert (np.diff(np.sort(children[:, 0])) > 0).all()  # 2^35 pairs of 64 bits: chance alone would have 2e-9


def test_names_that_people_give_meet_nowhere():
    blocks = [f"{stack}.{i}" for stack in ("layers", "blocks", "h", "encoder.layer") for i in range(128)]
    layers = [f"{block}.{layer}" for block in blocks for layer in ("attn", "mlp", "norm1", "conv2", "attn.q_proj")]
    names = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias", "g", "b")]
    assert len({hash_name(name) for name in names}) == len(names) == 10240
