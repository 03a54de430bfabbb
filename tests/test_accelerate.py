"""Draws through the compiled operator are the draws without it, bit for bit."""

import pytest
import torch

import biofunc as bf
from biofunc import accelerate as module
from biofunc import philox, random

SIZES = [0, 1, 7, 1000, 4099, 4 * sum(module.PIECES) + 5]
DRAWS = [random.uniform, random.normal]


@pytest.fixture
def accelerated():
    """Both executors of a function."""

    def both(function, *given):
        without = function(*given)
        random.accelerate()
        try:
            return without, function(*given)
        finally:
            random.accelerate(False)

    yield both
    assert not philox.ACCELERATED


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_draws_have_the_same_bits(accelerated, draw, dtype):
    keys = random.split(random.key(3), 2)
    for size in SIZES:
        without, with_operator = accelerated(lambda size=size: draw(keys, (size,), dtype=dtype))
        assert torch.equal(without, with_operator)
        assert with_operator.dtype == dtype


def test_counters_run_over_32_and_64_bits(accelerated):
    for offset in (2**32 - 2, 2**63 - 2, -2):
        key = torch.tensor([5, offset])
        assert torch.equal(*accelerated(lambda key=key: random.uniform(key, (4099,))))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("draw", DRAWS)
def test_ensembles_and_compiled_steps_have_the_same_bits(accelerated, draw):
    keys = random.split(random.key(4), 6).reshape(2, 3, 2)

    def member(key, size):
        return draw(key, (size.shape[0],)) * size

    nested = torch.vmap(torch.vmap(member, in_dims=(0, None)), in_dims=(0, None))
    for function in (nested, torch.compile(nested, fullgraph=True, backend="aot_eager")):
        assert torch.equal(*accelerated(function, keys, torch.ones(1001)))


def test_a_chain_with_every_kind_of_noise_has_the_same_bits(accelerated):
    params = {"a": torch.linspace(-1, 1, 600).reshape(30, 20), "b": torch.linspace(-1, 1, 35).reshape(5, 7)}
    learn = bf.chain(bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1), bf.rejuvenate_weights)

    def run(keys):
        state = torch.vmap(lambda key: learn.init(params, key))(keys)
        return torch.vmap(learn, in_dims=(None, None, 0))(params, params, state)[0]

    without, with_operator = accelerated(run, random.split(random.key(5), 3))
    for path, w in without.items():
        assert torch.equal(w, with_operator[path])


def test_noise_passes_through_gradients(accelerated):
    def value(w):
        return (w * random.normal(random.key(6), w.shape)).sum()

    assert torch.equal(*accelerated(torch.func.grad(value), torch.ones(50)))


def test_without_a_compiler_nothing_changes(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler; install g\+\+"):
        random.accelerate()
    assert not philox.ACCELERATED


def test_the_operator_tells_the_shape_of_what_it_draws():
    seed, offset = random.split(random.key(7), 3).unbind(-1)
    torch.library.opcheck(torch.ops.biofunc.rows.default, (seed, offset, 8, "normal"))
