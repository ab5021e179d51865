"""`styleforge verify`: what passes, that what is wrong fails, and the options."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from styleforge import ops
from styleforge.cli import app
from styleforge.verify import OPERATORS, Case, compare, grid, run_case, specific
from styleforge.verify.report import summary

runner = CliRunner()
CPU = torch.device("cpu")
FUNCTIONS = {
    "attention": "fused_attention",
    "ffn": "fused_ffn",
    "instance-norm": "fused_instance_norm",
    "conv": "fused_conv_instance_norm_relu",
}
SMALL = {
    "attention": {"seq_len": 9, "embed_dim": 16, "num_heads": 2},
    "ffn": {"seq_len": 9, "embed_dim": 16},
    "instance-norm": {"channels": 4, "height": 9, "width": 9},
    "conv": {"in_channels": 4, "out_channels": 4, "height": 9, "width": 9},
}


def _verify(code: int, *arguments: object) -> str:
    result = runner.invoke(app, ["verify", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout


def _usage_error(*arguments: object) -> str:
    result = runner.invoke(app, ["verify", *map(str, arguments)])
    assert result.exit_code == 2
    return result.stderr


def _replaced(monkeypatch: pytest.MonkeyPatch, operator: str, changed: Callable[[Tensor], Tensor]) -> None:
    """The operator's result goes through ``changed``."""
    right = getattr(ops, FUNCTIONS[operator])

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return changed(right(*args, **kwargs))

    monkeypatch.setattr(ops, FUNCTIONS[operator], wrong)


def _flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


# --- what passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_quick_passes(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    said = _verify(0, "--dtype", dtype, "--json", file, *(["--no-times"] if dtype == "float16" else []))
    assert "Total tests:  12" in said and "Failed:       0" in said and "Pass rate:    100.0%" in said
    report = json.loads(file.read_text())
    assert report["summary"]["passed"] == 12 and report["dtype"] == dtype
    for case in report["cases"]:
        assert case["passed"] and case["deterministic"] and case["path"]
        assert 0 < case["forward"]["max_difference"] <= case["forward"]["tolerance"]
        assert "input" in case["gradients"] and len(case["gradients"]) >= 3
        if dtype != "float16":
            assert case["speedup"] == pytest.approx(case["pytorch_ms"] / case["styleforge_ms"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_full_is_25_cases_and_more_and_each_differs(operator: str) -> None:
    cases = grid(operator, "full")
    assert len(cases) >= 25
    assert len({str(case) for case in cases}) == len(cases)


def test_full_holds_the_grid_that_users_know() -> None:
    cases = [case.config for case in grid("attention", "full")]
    for name, values in {
        "batch_size": {1, 2, 4, 8, 16},
        "seq_len": {64, 128, 256, 512},
        "embed_dim": {128, 256, 512},
        "num_heads": {1, 2, 4, 8},
        "bias": {True, False},
    }.items():
        assert values <= {config[name] for config in cases}
    kernels = {
        tuple(case.config[n] for n in ("kernel_size", "stride", "padding")) for case in grid("conv", "full")
    }
    assert kernels >= {(1, 1, 0), (3, 1, 1), (3, 2, 1), (4, 2, 1), (5, 1, 2), (5, 2, 2)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_specific_runs_what_it_is_given(operator: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = {"batch_size": 3, **SMALL[operator]}
    _verify(0, operator, "--mode", "specific", *_flags(options), "--json", file)
    (case,) = json.loads(file.read_text())["cases"]
    assert case["operator"] == operator
    assert {name: case["config"][name] for name in options} == options


def test_every_option_of_every_operator_is_a_flag() -> None:
    for operator, of in OPERATORS.items():
        for name, value in of.defaults.items():
            flag = f"--{name.replace('_', '-')}"
            given = [flag] if isinstance(value, bool) else [flag, str(value)]
            small = [f for f in _flags(SMALL[operator]) if not f.startswith(flag + "=")]
            _verify(0, operator, "--mode", "specific", "--no-times", "--forward-only", *small, *given)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_each_design_of_attention_can_be_asked_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = specific("attention", {**SMALL["attention"], "version": version})
    outcome = run_case(case, CPU, torch.float32, timed=False)
    assert outcome.passed and outcome.path.startswith(f"attention:{version}")
    monkeypatch.setitem(FUNCTIONS, "attention", f"fused_attention_{version}")
    _replaced(monkeypatch, "attention", lambda y: y + 1e-3)
    assert not run_case(case, CPU, torch.float32, timed=False).passed


def test_the_kinks_of_relu_inside_have_no_gradient_to_check() -> None:
    outcome = run_case(
        specific("ffn", {**SMALL["ffn"], "activation": "relu"}), CPU, torch.float32, timed=False
    )
    assert outcome.passed and not outcome.gradients
    for operator in ("instance-norm", "conv"):
        case = specific(operator, {**SMALL[operator], "activation": "relu"})
        assert run_case(case, CPU, torch.bfloat16, timed=False).gradients


@pytest.mark.cuda
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee")],
)
def test_full_passes_on_the_gpu(dtype: str, precision: str, operator: str) -> None:
    for case in grid(operator, "full"):
        given = getattr(torch, dtype)
        outcome = run_case(case, torch.device("cuda", 0), given, precision=precision, timed=False)
        assert outcome.passed, f"{case}: {outcome.problems}"
        assert "cuda" in outcome.path


@pytest.mark.cuda
def test_quick_with_times_on_the_gpu() -> None:
    result = runner.invoke(app, ["verify", "--device", "cuda"])
    assert result.exit_code == 0, result.output
    assert "Passed:       12" in result.stdout and "geometric mean" in result.stdout


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_result_ends_with_exit_code_1(
    operator: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _replaced(monkeypatch, operator, lambda y: y * (1 + 3e-5))
    file = tmp_path / "report.json"
    said = _verify(1, operator, "--mode", "specific", *_flags(SMALL[operator]), "--no-times", "--json", file)
    assert "FAILED" in said and "1: result: largest difference" in said
    assert "Failed:       1" in said and "Pass rate:    0.0%" in said
    assert json.loads(file.read_text())["summary"]["failed"] == 1


def test_a_failure_among_others_is_exit_code_1_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _replaced(monkeypatch, "ffn", lambda y: y + 1e-3)
    said = _verify(1, "all", "--no-times", "--forward-only")
    assert "Passed:       9" in said and "Failed:       3" in said and "Pass rate:    75.0%" in said


def _one_element(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[7] += 1e-4
    return y


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one element": (_one_element, "result: largest difference"),
    "not a number": (lambda y: y * float("nan"), "result: largest difference nan"),
    "gradient": (lambda y: y.detach() + 1.0001 * (y - y.detach()), "gradient of input: largest difference"),
    "shape": (lambda y: y[:, 1:], "error: ValueError: the result is [1, 8, 16]"),
    "dtype": (lambda y: y.double(), "torch.float64, PyTorch's"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_each_kind_of_fault_is_found_and_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, message = WRONG[fault]
    case = specific("ffn", SMALL["ffn"])
    assert run_case(case, CPU, torch.float32, timed=False).passed
    _replaced(monkeypatch, "ffn", changed)
    outcome = run_case(case, CPU, torch.float32, timed=False)
    assert not outcome.passed
    assert any(message in problem for problem in outcome.problems), outcome.problems


def test_other_bits_in_a_second_run_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    _replaced(monkeypatch, "ffn", lambda y: y * (1 + 2e-7 * (next(calls) % 2)))
    outcome = run_case(specific("ffn", SMALL["ffn"]), CPU, torch.float32, timed=False)
    assert outcome.problems == ["two runs differ in their bits"]


def test_an_operator_that_raises_is_a_failure_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(y: Tensor) -> Tensor:
        raise RuntimeError("fused_ffn: no memory\nat length")

    _replaced(monkeypatch, "ffn", broken)
    assert "error: RuntimeError: fused_ffn: no memory" in _verify(1, "ffn", "--no-times")


def test_the_tolerance_follows_pytorchs_error() -> None:
    reference = torch.randn(1000, dtype=torch.float64)
    near, far = (reference + error * torch.randn_like(reference) for error in (1e-5, 1e-4))
    assert not compare(far.float(), near.float(), reference).passed
    assert compare(near.float(), far.float(), reference).passed
    both = compare(far.float(), far.float(), reference)
    assert both.passed and 0.2 < both.share < 0.6


def test_the_summary_counts_the_speed_of_what_passed_alone() -> None:
    outcomes = [run_case(specific("ffn", SMALL["ffn"]), CPU, torch.float32) for _ in range(2)]
    outcomes[1].error = "wrong"
    assert outcomes[0].timing is not None
    totals = summary(outcomes)
    assert (totals.total, totals.passed, totals.failed, totals.pass_rate) == (2, 1, 1, 50.0)
    assert totals.average_speedup == pytest.approx(outcomes[0].timing.speedup)


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "specific", "--seq-len", "8"], "--mode specific needs one operator: attention, ffn"),
        (["attention", "--seq-len", "8"], "--seq-len needs --mode specific"),
        (["ffn", "--mode", "specific", "--num-heads", "8"], "--num-heads is no option of ffn, which takes"),
        (["attention", "--mode", "specific", "--num-heads", "3"], "--num-heads must divide --embed-dim"),
        (["attention", "--mode", "specific", "--embed-dim", "512", "--num-heads", "1"], "may be 256 wide"),
        (["ffn", "--mode", "specific", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["ffn", "--mode", "specific", "--activation", "tanh"], "--activation must be one of gelu"),
        (["conv", "--mode", "specific", "--kernel-size", "99"], "larger than the padded height"),
        (["conv", "--mode", "specific", "--upsample", "3"], "--upsample must be 1 or 2"),
        (["ffn", "--json", "/no/such/folder/file"], "--json: cannot write"),
        (["ffn", "--device", "tpu"], "--device must be auto, cpu, cuda"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    (line,) = _usage_error(*arguments).splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("arguments", [["softmax"], ["--mode", "slow"], ["--dtype", "int8"]])
def test_unknown_choices_are_refused(arguments: list[str]) -> None:
    assert "Invalid value" in _usage_error(*arguments)


def test_cases_are_named_by_what_they_are() -> None:
    case = specific("attention", {"bias": False, "causal": True})
    assert str(case) == "bs=1 seq=128 embed=128 heads=4 no bias causal"
    assert isinstance(case, Case)
