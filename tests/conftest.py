"""Settings of the suite: no deadlines in property tests, one thread, global generators watched."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "biofunc", deadline=None, max_examples=25, print_blob=True, derandomize=True, database=None
)
hypothesis.settings.load_profile("biofunc")


@pytest.fixture(autouse=True)
def global_generator_is_left_alone():
    """Nothing in biofunc may read or move PyTorch's global generator; a test that does so itself restores it."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


def pytest_configure(config):
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
