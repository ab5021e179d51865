"""PyTorch's precision flags, set for a call and set back: they are the whole process's, not a thread's."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from styleforge.ops import _precision

CUDA_TENSOR: Any = SimpleNamespace(is_cuda=True, dtype=torch.float32)
FLAGS: dict[str, Any] = {
    "convolutions": (_precision.convolutions_in, torch.backends.cudnn.conv),
    "matmuls": (_precision.matmuls_in, torch.backends.cuda.matmul),
}


@pytest.fixture(autouse=True)
def _flags_as_they_were() -> Any:
    before = [flags.fp32_precision for _, flags in FLAGS.values()]
    yield
    after = [flags.fp32_precision for _, flags in FLAGS.values()]
    assert after == before


@pytest.mark.parametrize("name", FLAGS)
def test_within_one_another(name: str) -> None:
    taking, flags = FLAGS[name]
    with taking("ieee"):
        with taking("tf32"):
            with pytest.raises(ValueError), taking("ieee"):
                assert flags.fp32_precision == "ieee"
                raise ValueError
            assert flags.fp32_precision == "tf32"
        assert flags.fp32_precision == "ieee"


@pytest.mark.parametrize("name", FLAGS)
def test_two_threads_that_overlap(name: str) -> None:
    """The first one leaves while the second is still inside."""
    taking, flags = FLAGS[name]
    users = flags.fp32_precision
    asked = "tf32" if users != "tf32" else "ieee"
    entered, left, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with taking(asked):
            entered.set()
            left.wait(60)
            seen.append(flags.fp32_precision)

    with taking(asked):
        other = threading.Thread(target=second)
        other.start()
        assert entered.wait(60)
    left.set()
    other.join(60)
    assert seen == [asked]
    assert flags.fp32_precision == users


def test_what_another_thread_has_set_is_not_the_users() -> None:
    asked = "tf32" if _precision.matmul_precision() == "ieee" else "ieee"
    x = CUDA_TENSOR
    with _precision.matmuls_in(asked):
        with _precision.matmuls_of(x, asked):
            assert _precision._matmuls.taken == [asked, asked]
        assert _precision.precision_of_products(asked, x) is None
    assert not _precision._matmuls.taken
    assert _precision.matmuls_of(x, _precision.matmul_precision()) is _precision._as_they_are
    asked = "tf32" if _precision.conv_precision() == "ieee" else "ieee"
    with _precision.convolutions_in(asked):
        assert not _precision.convolutions_are_in(asked)
    assert _precision.convolutions_are_in(_precision.conv_precision())
