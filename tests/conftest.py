"""What all tests share: one thread and a fixed seed, so that a failure can be repeated."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
