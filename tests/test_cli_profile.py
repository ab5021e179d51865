"""`styleforge profile`: which operators ran, on which path, and for how long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from styleforge import FusedAttention, FusedFFN, FusedInstanceNorm2d, last_path
from styleforge.bench.profile import profile
from styleforge.cli import app
from styleforge.models import TransformerNet, save_checkpoint

runner = CliRunner()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_checkpoint(TransformerNet(4), path)
    return path


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_of_a_network_with_their_paths_and_times(checkpoint: Path, device: str) -> None:
    result = runner.invoke(app, ["profile", str(checkpoint), "--size", "32x48", "--device", device])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    rows = [line for line in lines if "fused_conv_instance_norm_relu" in line]
    last = [line for line in lines if "_reflect_conv2d" in line]  # where it has a kernel
    assert sum(int(row[-3]) for row in rows) == 15
    assert all(row[1].startswith(f"conv_instance_norm_relu:{device}") for row in rows)
    assert ["1x3x32x48", "4x3x9x9"] in [row[2:4] for row in rows]
    assert all(float(row[-2]) > 0 for row in rows)
    (total,) = (line[-2] for line in lines if line[:2] == ["in", "all"])
    (other,) = (line[-2] for line in lines if line[:2] == ["other", "operators"])
    assert float(other) + sum(float(row[-2]) for row in rows + last) == pytest.approx(float(total), abs=0.01)


def test_nothing_but_the_table_is_printed(checkpoint: Path) -> None:
    """The profiler writes lines of its own from C++, past Python's streams."""
    command = [
        sys.executable,
        "-m",
        "styleforge",
        "profile",
        str(checkpoint),
        "--size",
        "16",
        "--device",
        "cpu",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished.stderr == "" and finished.stdout.startswith(str(checkpoint))


@pytest.mark.parametrize("device", DEVICES)
def test_each_operator_in_the_order_of_the_calls(device: str) -> None:
    norm = FusedInstanceNorm2d(4).to(device)
    attention, ffn = FusedAttention(4, 2).to(device).eval(), FusedFFN(4, 8).to(device).eval()
    x = torch.randn(2, 4, 5, 6, device=device)
    paths: list[str] = []

    def forward() -> Tensor:
        paths.clear()
        y = norm(norm(x))
        paths.append(last_path())
        tokens = attention(y.flatten(2).transpose(1, 2))
        paths.append(last_path())
        result: Tensor = ffn(tokens)
        paths.append(last_path())
        return torch.relu(result)

    found = profile(forward, torch.device(device))
    assert [(row.call.operator, row.calls) for row in found.rows] == [
        ("fused_instance_norm", 2),
        ("fused_attention", 1),
        ("fused_ffn", 1),
    ]
    assert [row.call.path for row in found.rows] == paths
    assert found.rows[2].call.weight == (8, 4)
    assert 0 < found.other_ms < found.total_ms


def test_a_forward_that_changes_is_refused() -> None:
    norm, x = FusedInstanceNorm2d(4), torch.randn(1, 4, 5, 6)
    calls: list[int] = []

    def forward() -> None:
        calls.append(0)
        for _ in calls:
            norm(x)

    with pytest.raises(RuntimeError, match="did not call the same operators"):
        profile(forward, torch.device("cpu"))


def test_a_forward_without_styleforge_is_all_others() -> None:
    x = torch.randn(100)
    found = profile(lambda: x + 1, torch.device("cpu"))
    assert not found.rows and found.other_ms == found.total_ms > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-style"], "unknown style 'no-such-style'"),
        (["none/such.pth"], "no such file: none/such.pth"),
        (["mosaic", "--size", "8"], "--size must be at least 16x16"),
        (["mosaic", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["mosaic", "--device", "tpu"], "--device must be auto"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["profile", *arguments])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
