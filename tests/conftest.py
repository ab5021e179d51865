"""What every test file shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import providers

# Kernels and compilers take their time; the examples are the same on each run. (Hypothesis takes one number
# in 20 from the constants of the modules imported by then: beside other tests, a seed gave other examples.)
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = providers.Constants
settings.register_profile("styleforge", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("styleforge")

# The workers of pytest-xdist share the cores: with threads on every core each, they mostly wait.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    _threads = max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0)) // _workers))
    torch.set_num_threads(_threads)
    os.environ["OMP_NUM_THREADS"] = str(_threads)  # of the processes that tests start


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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that the workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def programs(shared_folder: Path) -> Path:
    """The folder with the C++ programs of ``tests/cpp`` and ``examples/cpp``, built."""
    import _cpp

    folder = shared_folder / "cpp"
    _cpp.build(folder)
    return folder
