import pytest
import torch


@pytest.fixture
def poisoned_empty():
    """Fills torch.empty with NaN, so that an output that was not written cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
