"""Draws by the compiled kernel are the draws without it, bit for bit."""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import biofunc as bf
from biofunc import accelerate as module
from biofunc import philox, random

SIZES = [0, 1, 7, 255, 256, 257, 1000, 4096, 4099, 40_001]
DRAWS = [random.uniform, random.normal]


class Spy:
    """A kernel that notes what is called."""

    def __init__(self, library):
        self.library, self.called = library, []

    def __getattr__(self, name):
        self.called.append(name)
        return getattr(self.library, name)


@pytest.fixture
def own_kernel():
    """The kernel is compiled anew in this test, and after it."""
    module._kernel.cache_clear()
    yield
    module._kernel.cache_clear()


@pytest.fixture
def accelerated(monkeypatch):
    """Both executors of a function; the second one goes through the kernel, or it is said not to."""

    def both(function, *given, kernel=True):
        without = function(*given)
        spy = Spy(module._kernel())
        with monkeypatch.context() as patch:
            patch.setattr(module, "_kernel", lambda: spy)
            random.accelerate()
            try:
                result = function(*given)
            finally:
                random.accelerate(False)
        assert ("biofunc_draws" in spy.called) == kernel
        return without, result

    yield both
    assert not philox.ACCELERATED


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_draws_have_the_same_bits(accelerated, draw, dtype):
    keys = random.split(random.key(3), 2)
    kernel = not (draw is random.uniform and dtype == torch.float64)
    for size in SIZES:
        without, drawn = accelerated(lambda size=size: draw(keys, (size,), dtype=dtype), kernel=kernel)
        assert torch.equal(without, drawn)
        assert drawn.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_do_not_matter(accelerated, dtype):
    key = random.key(12)
    expected = random.normal(random.fold_in(key, 3), (1001,)), random.normal(key, ())
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            both = accelerated(lambda: (random.normal(random.fold_in(key, 3), (1001,)), random.normal(key, ())))
    finally:
        torch.set_default_dtype(torch.float32)
    for drawn in both:
        for leaf, other in zip(drawn, expected, strict=True):
            assert leaf.device.type == "cpu"
            assert leaf.dtype == torch.float32
            assert torch.equal(leaf, other)


def test_a_few_numbers_of_each_of_many_keys_have_the_same_bits(accelerated):
    keys = random.split(random.key(13), 9000)
    for size in (1, 5, 300):
        assert torch.equal(*accelerated(lambda size=size: random.normal(keys, (size,))))


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


words = st.integers(-(2**63), 2**63 - 1)


@settings(deadline=None, max_examples=50)
@given(
    seed=words, offset=words, counts=st.lists(st.integers(0, 600), min_size=1, max_size=4), start=st.integers(0, 2**62)
)
def test_any_keys_counters_and_counts_have_the_same_bits(seed, offset, counts, start):
    keys = [random.fold_in(torch.tensor([seed, offset]), leaf) for leaf in range(len(counts))]
    keys[0] = torch.tensor([seed, offset])
    starts = [start + leaf for leaf in range(len(counts))]
    for kind in philox.CONVERSIONS:
        without = philox.ragged_draws(keys, starts, counts, kind)
        random.accelerate()
        try:
            drawn = philox.ragged_draws(keys, starts, counts, kind)
        finally:
            random.accelerate(False)
        assert [leaf.tolist() for leaf in drawn] == [leaf.tolist() for leaf in without]


@settings(deadline=None, max_examples=100)
@given(seed=words, offset=words, data=words, name=st.text(max_size=5))
def test_any_derived_keys_have_the_same_bits(seed, offset, data, name):
    key = torch.tensor([[seed, offset], [offset, seed]])

    def derived():
        integers = torch.tensor([data, 0, -1])
        return [
            random.split(key, 3),
            random.fold_in(key, data),
            random.fold_in(key, name),
            random.fold_in(key[:, None], integers),
            torch.vmap(random.fold_in, in_dims=(0, None))(key, integers[0]),
            torch.vmap(random.fold_in, in_dims=(None, 0))(key[0], integers),
            torch.vmap(lambda one: random.fold_in(one, name))(key),
        ]

    without = derived()
    random.accelerate()
    try:
        drawn = derived()
    finally:
        random.accelerate(False)
    assert [keys.tolist() for keys in drawn] == [keys.tolist() for keys in without]


def test_all_normals_are_those_of_the_table(accelerated):
    """2^22 words hit every segment of the table, on both sides."""
    assert torch.equal(*accelerated(random.normal, random.key(8), (1 << 22,)))


def test_the_number_of_threads_changes_no_bit(accelerated):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(*accelerated(random.normal, random.key(9), (200_003,)))
    finally:
        torch.set_num_threads(threads)


def test_large_leaves_are_drawn_apart_from_small_ones(accelerated, monkeypatch):
    monkeypatch.setattr(philox, "TOGETHER", 1000)
    counts = [10, 2000, 300, 300, 300, 300, 0, 1000, 1001, 5]
    keys = list(random.split(random.key(10), len(counts)))
    without, drawn = accelerated(philox.ragged_draws, keys, [0] * len(counts), counts, "normal")
    for leaf, other, count in zip(drawn, without, counts, strict=True):
        assert leaf.shape == (count,)
        assert torch.equal(leaf, other)


@pytest.mark.usefixtures("own_kernel")
def test_without_a_compiler_nothing_changes(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler; install g\+\+"):
        random.accelerate()
    assert not philox.ACCELERATED


@pytest.mark.usefixtures("own_kernel")
def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(RuntimeError, match="CXX names 'no-such-compiler', which is not there"):
        random.accelerate()
    assert not philox.ACCELERATED


@pytest.mark.usefixtures("own_kernel")
def test_a_compiler_that_fails_is_named_with_what_it_says(monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such thing >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match=r"could not compile .*philox\.cpp: no such thing"):
        random.accelerate()
    assert not philox.ACCELERATED


@pytest.mark.usefixtures("own_kernel")
def test_a_kernel_that_cannot_be_loaded_is_an_error_with_a_remedy(monkeypatch):
    def refused(path):
        raise OSError("failed to map segment")

    monkeypatch.setattr(module.ctypes, "CDLL", refused)
    with pytest.raises(
        RuntimeError, match="failed to map segment; TMPDIR must name a folder from which programs may run"
    ):
        random.accelerate()
    assert not philox.ACCELERATED


@pytest.mark.usefixtures("own_kernel")
def test_a_compiler_without_openmp_will_do(monkeypatch, accelerated):
    run = subprocess.run
    tried = []

    def without_openmp(command, **keywords):
        tried.append(command)
        return run(["false"] if "-fopenmp" in command else command, **keywords)

    monkeypatch.setattr(module.subprocess, "run", without_openmp)
    assert torch.equal(*accelerated(random.normal, random.key(11), (70_001,)))
    assert len(tried) == 3


def test_the_kernel_knows_all_kinds():
    assert module.BITS.keys() == philox.CONVERSIONS.keys()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_chain_by_inductor_has_the_same_bits_as_its_draws(accelerated):
    @bf.rule(phase="weights")
    def reveal(params, grads, state, *, noise):
        uniform, normal = noise.draw(params, "uniform", "normal")
        return {path: torch.stack([uniform[path], normal[path]]).sum(0) for path in params}, grads, state

    params = {"a": torch.zeros(3, 40, 50), "b": torch.zeros(3, 7, 1)}
    learn = bf.chain(bf.rejuvenate_weights, reveal)
    states = torch.vmap(learn.init)(params, random.split(random.key(14), 3))
    eager = torch.vmap(learn)(params, params, states)[0]
    compiled = torch.compile(torch.vmap(learn), fullgraph=True)
    for drawn in accelerated(lambda: compiled(params, params, states)[0]):
        for path, w in drawn.items():
            assert torch.equal(w, eager[path])


def test_a_size_that_varies_is_compiled_once(accelerated):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    draw = torch.compile(lambda key, x: random.uniform(key, x.shape) + x, fullgraph=True, backend=counter, dynamic=True)
    sizes = (1001, 77, 5000)

    def drawn():
        return torch.cat([draw(random.key(15), torch.zeros(size)) for size in sizes])

    without, with_kernel = accelerated(drawn)
    assert torch.equal(without, with_kernel)
    assert counter.frame_count == 2  # one graph for each executor


def test_the_operators_tell_the_shape_of_what_they_draw():
    keys = random.split(random.key(7), 6).reshape(2, 3, 2)
    low, high = torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.int64)
    for given_ in [(keys, [0, 1, 2], [5, 0, 9], "normal"), (keys[:0], [0, 1, 2], [5, 0, 9], "uniform")]:
        torch.library.opcheck(torch.ops.biofunc.draws.default, given_)
    torch.library.opcheck(torch.ops.biofunc.derive.default, (keys, low, high, 1))
