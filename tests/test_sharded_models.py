"""Rules on models that several processes share. The processes run `sharded_worker.work`, one group per world size."""

import datetime

import pytest
import sharded_worker
import torch

import biofunc as bf
from biofunc import parts, sharding


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_sharded_run_is_the_run_of_one_process(world, tmp_path):
    ranks = torch.multiprocessing.spawn(sharded_worker.work, (world, str(tmp_path)), nprocs=world, join=False)
    try:
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=sharded_worker.LIMIT)
        while not ranks.join(timeout=1):
            assert datetime.datetime.now() < deadline, "the processes wait for each other, or the machine is busy"
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    for rank in range(world):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True)["wrong"] == [], rank


@pytest.mark.parametrize("kind", ["uniform", "normal"])
@pytest.mark.parametrize(("length", "starts"), [(1, (0, 3, 5, 999)), (2, (3,)), (7, (1, 2, 3, 4)), (5, ()), (0, (3,))])
def test_parts_of_a_draw_are_slices_of_it(kind, length, starts):
    key = bf.random.fold_in(bf.random.key(1), "parts")
    whole = getattr(bf.random, kind)(key, (1010,))
    words = bf.random.rademacher(key, (1010,))
    part = parts.Part((len(starts) * length,), length, starts=torch.tensor(starts, dtype=torch.int64))
    for one in [part] if len(starts) != 1 else [part, parts.Part((length,), length, starts[0])]:
        wanted = torch.cat([torch.arange(start, start + length) for start in starts]) if starts else torch.arange(0)
        assert torch.equal(parts.draws(key, one, kind), whole[wanted])
        assert torch.equal(1 - ((parts.words(key, one) >> 22) & 2), words[wanted])
        assert torch.equal(parts.draws(key, one.shifted(8), kind), getattr(bf.random, kind)(key, (1018,))[wanted + 8])


def test_parts_of_an_accelerated_draw_are_slices_of_it():
    key, part = bf.random.key(1), parts.Part((3, 9), 9, starts=torch.tensor([2, 33, 501]))
    plain = parts.draws(key, part, "normal")
    bf.random.accelerate()
    try:
        assert torch.equal(parts.draws(key, part, "normal"), plain)
        assert torch.equal(parts.draws(key, parts.Part((9,), 9, 33), "normal"), plain[9:18])
    finally:
        bf.random.accelerate(False)


@pytest.mark.parametrize(("size", "count"), [(7, 2), (7, 4), (3, 4), (8, 4), (0, 2), (1, 1)])
def test_chunks_are_those_of_torch(size, count):
    index = torch.arange(size) + 5
    given = ((5, 5 + size),) if size < 4 else ((5, 8), (8, 5 + size))
    chunks = list(index.chunk(count)) + [index[:0]] * count
    for place in range(count):
        pieces = sharding._chunk(given, count, place)
        assert [i for low, high in pieces for i in range(low, high)] == chunks[place].tolist()


def test_a_draw_takes_its_shape_from_one_argument():
    w = torch.ones(2, 3)
    assert torch.equal(bf.random.normal(bf.random.key(0), like=w), bf.random.normal(bf.random.key(0), (2, 3)))
    with pytest.raises(ValueError, match=r"shape is \(3,\) and like has shape \(2, 3\)"):
        bf.random.normal(bf.random.key(0), (3,), like=w)
