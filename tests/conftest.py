"""What every test file shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Kernels and compilers take their time; the examples are the same on each run.
settings.register_profile("styleforge", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("styleforge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` are skipped, visibly, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and a PyTorch with CUDA")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
