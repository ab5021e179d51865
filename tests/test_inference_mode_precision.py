"""Modules' precision in inference mode, where operators' autograd kernels do not set PyTorch's for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import styleforge
from _reference import matmul_tf32, rms_error
from styleforge.nn import FusedAttention, FusedFFN
from styleforge.ops import _precision


def _module(kind: str, embed_dim: int, precision: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "ffn":
        return FusedFFN(embed_dim, 2 * embed_dim, precision=precision).eval()
    return FusedAttention(embed_dim, max(2, embed_dim // 64), precision=precision).eval()


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_pytorchs_products_are_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def record(input: Tensor, precision: str) -> AbstractContextManager[None]:
        told.append(precision)
        return nullcontext()

    monkeypatch.setattr(_precision, "matmuls_of", record)
    with matmul_tf32(False), torch.inference_mode():
        _module(kind, 8, "tf32")(torch.randn(2, 5, 8))
    assert told == ["tf32"]


@pytest.mark.cuda
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("kind", "path"), [("attention", ":math"), ("ffn", "aten_matmul")])
def test_the_modules_precision_counts_and_not_the_flag(
    kind: str, path: str, flag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STYLEFORGE_PATH", "math")  # PyTorch's products for all of it
    x = torch.randn(2, 256, 512, device="cuda")
    errors = {}
    with matmul_tf32(flag):
        for precision in ("ieee", "tf32"):
            module = _module(kind, 512, precision).cuda()
            with torch.inference_mode():
                y = module(x)
                assert path in styleforge.last_path()
                errors[precision] = rms_error(y, module.double()(x.double()).cpu())
            assert torch.backends.cuda.matmul.allow_tf32 == flag
    assert errors["ieee"] * 30 < errors["tf32"]
