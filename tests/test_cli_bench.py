"""`styleforge bench`: statistics, correctness before speed, what is written, and what it says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import statistics
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import styleforge
from _onnx import needs_onnx
from styleforge.bench import (
    cases,
    contenders,
    correctness,
    floors,
    operators,
    plots,
    precision,
    timing,
    turns,
)
from styleforge.bench.stats import summarize
from styleforge.cli import app

runner = CliRunner()
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)

TINY = [
    ("attention", "standard", "1x8x16/2"),
    ("ffn", "standard", "1x8x16->32"),
    ("ffn", "residual", "1x8x16->32"),
    ("instance-norm", "standard", "2x3x8x8"),
    ("instance-norm", "residual", "2x3x8x8"),
    ("conv", "standard", "1x4->8@9x8k3s2"),
    ("conv", "real-world", "1x3->4@12x12k9s1"),
    ("conv", "residual", "1x4@8x8"),
    ("transformer-net", "standard", "1x16x20"),
]


@pytest.fixture(autouse=True)
def _rates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of a machine take longer than the tiny cases: one test measures them."""
    if request.node.get_closest_marker("cuda") is None and "real_rates" not in request.node.name:
        monkeypatch.setattr(floors, "measure_rates", lambda *_: floors.Rates(1e10, 1e11, "assumed"))


def _bench(*arguments: object, code: int = 0) -> Result:
    options = ("--config", "fast", "--seconds", "0", "--device", "cpu")
    result = runner.invoke(app, ["bench", *map(str, arguments), *options], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def _json(tmp_path: Path, *arguments: object, code: int = 0) -> tuple[dict[str, Any], Result]:
    file = tmp_path / "bench.json"
    result = _bench(*arguments, "--json", file, code=code)
    return json.loads(file.read_text()), result


# --- statistics, floors, cases --------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_statistics(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(3, 1, count)
    found = summarize(samples.tolist())
    assert found.count == count
    assert found.mean == pytest.approx(samples.mean())
    assert found.median == pytest.approx(np.median(samples))
    assert found.std == pytest.approx(statistics.stdev(samples.tolist()) if count > 1 else 0)
    assert (found.minimum, found.maximum) == (samples.min(), samples.max())


def test_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        summarize([])


def test_floor() -> None:
    rates = floors.Rates(copy=1e9, product=1e12, product_is="")
    assert floors.floor(2e6, 1e9, rates) == (pytest.approx(2000), "memory")
    assert floors.floor(1e6, 2e9, rates) == (pytest.approx(2000), "arithmetic")


def test_real_rates() -> None:
    found = floors.measure_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < found.copy < 1e13 and 1e8 < found.product < 1e16
    assert "float32" in found.product_is


def test_every_listed_case_can_be_made() -> None:
    for (operator, mode), (few, more) in cases.SUITES.items():
        assert few and len({*few, *more}) == len(few) + len(more)
        assert [case.name for case in cases.cases(operator, mode, suite=False)] == list(few)
        if operator != "transformer-net":
            assert [case.name for case in cases.cases(operator, mode, suite=True)] == [*few, *more]
    assert {operator for operator, _ in cases.SUITES} == set(cases.OPERATORS)


@pytest.mark.parametrize(("operator", "mode", "text"), TINY)
def test_case_is_what_its_modules_are(operator: str, mode: str, text: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = cases.parse(operator, mode, text)
    plain, ours = (module.eval() for module in case.modules())
    x = case.input(torch.device("cpu"), torch.float32)
    assert tuple(x.shape) == case.input_shape
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-3, atol=1e-3)
    assert plain(x).numel() == case.output_elements
    for a, b in zip(plain.parameters(), ours.parameters(), strict=True):  # gradients are compared in turn
        assert torch.equal(a, b)
    with FlopCounterMode(display=False) as counter:
        plain(x)  # with gradients: without, nn.MultiheadAttention is one operation that is not counted
    assert case.operations == pytest.approx(
        counter.get_total_flops(), rel=0.4 if operator == "attention" else 0
    )


@pytest.mark.parametrize(
    ("operator", "mode", "text"),
    [
        ("attention", "standard", "1x8x16"),
        ("attention", "standard", "1x8x16/3"),
        ("ffn", "standard", "1x8x16"),
        ("conv", "standard", "1x4@8x8"),
        ("conv", "residual", "1x4->8@8x8k3s1"),
        ("instance-norm", "standard", "0x3x8x8"),
        ("transformer-net", "standard", "1x8x8"),
    ],
)
def test_bad_case(operator: str, mode: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{text}'")):
        cases.parse(operator, mode, text)


def test_errors() -> None:
    exact = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert correctness.errors([torch.tensor([3.0, 4.5])], exact) == (pytest.approx(0.1), pytest.approx(0.5))
    assert all(map(math.isnan, correctness.errors([torch.tensor([3.0, math.nan])], exact)))
    assert all(map(math.isnan, correctness.errors([torch.zeros(3)], exact)))
    # A gradient that is rounding noise around zero does not count as wholly wrong.
    noise = [torch.tensor([1e-12], dtype=torch.float64)]
    assert correctness.errors([torch.tensor([3.0, 4.0]), torch.tensor([-1e-9])], exact + noise)[0] < 1e-5
    assert correctness.errors([torch.tensor([3.0, 4.0]), torch.tensor([0.5])], exact + noise)[0] > 0.05
    small = [torch.tensor([0.1], dtype=torch.float64)]
    assert correctness.errors([torch.tensor([3.0, 4.0]), torch.zeros(1)], exact + small)[0] == 1
    assert not correctness.Check(math.nan, math.nan, 1.0, True).passed


def test_wall_times_take_turns_and_stop_in_time() -> None:
    order: list[str] = []
    calls: list[Callable[[], Any]] = [lambda: order.append("a"), lambda: order.append("b")]
    found = timing.wall_times(calls, repeats=4, warmup=1)
    assert order == ["a", "b"] * 5
    assert [len(own) for own in found] == [4, 4]
    assert [len(own) for own in timing.wall_times(calls, repeats=100, seconds=0)] == [
        timing.LEAST_SAMPLES
    ] * 2
    assert all(time >= 0 for time in timing.cpu_times(calls, repeats=3))
    assert callable(operators.main)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("operator", "mode", "text"), TINY)
def test_each_operator(tmp_path: Path, operator: str, mode: str, text: str) -> None:
    data, result = _json(tmp_path, operator, "--mode", mode, "--case", text, "--against", "eager")
    assert data["format"] == 1 and data["passed"] is True
    assert data["environment"]["pytorch"] == torch.__version__
    assert data["environment"]["styleforge"] == styleforge.__version__
    assert data["settings"]["mode"] == mode and data["settings"]["iterations"] == 20
    assert data["rates"] == {"copy": 1e10, "product": 1e11, "product_is": "assumed"}
    (table,) = data["tables"]
    (case,) = table["cases"]
    assert (case["operator"], case["case"], case["failures"]) == (operator, text, [])
    assert set(case["contenders"]) == {"styleforge", "eager"}
    for contender in case["contenders"].values():
        wall = contender["wall"]
        assert wall["count"] == timing.LEAST_SAMPLES and contender["gpu"] is None
        assert 0 < wall["minimum"] <= wall["median"] <= wall["maximum"]
        assert wall["minimum"] <= wall["mean"] <= wall["maximum"]
        assert contender["check"]["error"] <= contender["check"]["tolerance"]
        assert contender["check"]["deterministic"] is True
        rates = contender["throughput"]
        assert rates["percent_of_floor"] == pytest.approx(100 * case["floor_us"] / wall["median"])
        assert rates["gb_per_s"] == pytest.approx(case["bytes"] / wall["median"] / 1e3)
        assert ("tflop_per_s" in rates) == (operator != "instance-norm")
        assert ("tokens_per_s" in rates) == (operator in ("attention", "ffn"))
    times = [case["contenders"][name]["wall"]["median"] for name in ("eager", "styleforge")]
    assert case["speedups"] == {"eager": pytest.approx(times[0] / times[1])}
    assert len(table["losses"]) == (times[0] < times[1])
    # What is right is said before what is fast, and every table ends with where we lose.
    out = result.stdout
    assert out.index("relative error") < out.index("x as fast") < out.index("where we lose")


def test_cases_of_several_operators(tmp_path: Path) -> None:
    texts = ("--case", "ffn 1x8x16->32", "--case", "conv 1x4->8@9x8k3s2", "--case", "ffn 2x8x16->32")
    data, _ = _json(tmp_path, *texts, "--against", "eager")
    found = [(case["operator"], case["case"]) for table in data["tables"] for case in table["cases"]]
    assert found == [("ffn", "1x8x16->32"), ("ffn", "2x8x16->32"), ("conv", "1x4->8@9x8k3s2")]
    conv = data["tables"][1]["cases"][0]["contenders"]
    for contender in conv.values():
        assert set(contender["formats"]) == {"contiguous", "channels_last"}
        assert min(contender["formats"].values()) == contender["wall"]["median"]


def test_training_step(tmp_path: Path) -> None:
    data, _ = _json(tmp_path, "conv", "--case", "1x4->8@8x8k3s1", "--against", "eager,jax", "--backward")
    (case,) = data["tables"][0]["cases"]
    forward = cases.parse("conv", "standard", "1x4->8@8x8k3s1")
    assert case["operations"] == 3 * forward.operations
    assert set(case["contenders"]) == {"styleforge", "eager"}
    assert case["missing"] == {"jax": "measured in inference only"}


def _wrong(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    return torch.zeros_like(input)


def test_wrong_result_has_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(styleforge.FusedFFN, "forward", _wrong)
    page = tmp_path / "bench.html"
    arguments = ("ffn", "--case", "1x8x16->32", "--against", "eager", "--html", page)
    data, result = _json(tmp_path, *arguments, code=1)
    assert "WRONG" in result.stdout and "relative error 1, allowed 1e-05" in result.stdout
    assert "as fast" not in result.stdout and "where we lose" not in result.stdout
    assert "error: wrong or not repeatable: ffn 1x8x16->32" in result.stderr
    (case,) = data["tables"][0]["cases"]
    assert data["passed"] is False and case["speedups"] == {} and case["contenders"] == {}
    text = page.read_text()
    assert "wrong result" in text and "as fast" not in text


def test_wrong_in_one_memory_format_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = styleforge.FusedConvInstanceNormReLU.forward

    def forward(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        result = right(self, input, residual)
        return result if input.is_contiguous() else result + 1

    monkeypatch.setattr(styleforge.FusedConvInstanceNormReLU, "forward", forward)
    arguments = ("conv", "--case", "1x4->8@8x8k3s1", "--against", "eager")
    data, result = _json(tmp_path, *arguments, code=1)
    (failure,) = data["tables"][0]["cases"][0]["failures"]
    assert failure.startswith("channels_last: wrong result")
    assert "as fast" not in result.stdout


def test_result_that_changes_from_run_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, calls = styleforge.FusedFFN.forward, itertools.count()

    def forward(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return right(self, input, residual) * (1 + 1e-6 * (next(calls) % 2))

    monkeypatch.setattr(styleforge.FusedFFN, "forward", forward)
    data, result = _json(tmp_path, "ffn", "--case", "1x8x16->32", "--against", "eager", code=1)
    assert data["tables"][0]["cases"][0]["failures"] == ["contiguous: repeated calls differ"]
    assert "error: wrong or not repeatable" in result.stderr


def test_where_we_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    right = styleforge.FusedFFN.forward

    def forward(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        time.sleep(0.01)
        return right(self, input, residual)

    monkeypatch.setattr(styleforge.FusedFFN, "forward", forward)
    out = _bench("ffn", "--case", "1x8x16->32", "--against", "eager").stdout
    assert re.search(r"where we lose:\s+1x8x16->32: [\d.]+ times the time of eager", out)


def test_contenders_that_cannot_take_part_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise contenders.Unavailable(f"not installed (pip install {name})")

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("no compiler\nmore of it")

    monkeypatch.setattr(contenders, "_import", missing)
    monkeypatch.setattr(torch, "compile", broken)
    data, result = _json(tmp_path, "ffn", "--case", "1x8x16->32", "--against", "all")
    assert data["tables"][0]["cases"][0]["missing"] == {
        "compile": "failed: RuntimeError: no compiler",
        "cudagraph": "needs a CUDA device",
        "onnxruntime": "not installed (pip install onnxruntime)",
        "jax": "not installed (pip install jax)",
    }
    assert "not measured: jax: not installed (pip install jax)" in result.stdout


def test_another_contender_that_is_wrong_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda x: module(x) + 1)
    data, _ = _json(tmp_path, "ffn", "--case", "1x8x16->32", "--against", "eager,compile")
    (case,) = data["tables"][0]["cases"]
    assert set(case["speedups"]) == {"eager"}
    assert case["missing"]["compile"].startswith("wrong result")


def test_onnxruntime(tmp_path: Path) -> None:
    needs_onnx()
    data, _ = _json(tmp_path, "ffn", "--case", "1x8x16->32", "--against", "onnxruntime")
    assert set(data["tables"][0]["cases"][0]["speedups"]) == {"onnxruntime"}


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
@pytest.mark.parametrize(("operator", "mode", "text"), TINY[:-1])
def test_jax(tmp_path: Path, operator: str, mode: str, text: str) -> None:
    data, _ = _json(tmp_path, operator, "--mode", mode, "--case", text, "--against", "jax")
    assert set(data["tables"][0]["cases"][0]["speedups"]) == {"jax"}


# --- the page -------------------------------------------------------------------------------------


class _Links(HTMLParser):
    """What a page loads or links to, and its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]


def _page(tmp_path: Path) -> tuple[str, _Links]:
    file = tmp_path / "bench.html"
    texts = ("--case", "1x8x16->32", "--case", "2x8x16->32")
    _bench("ffn", *texts, "--against", "eager,cudagraph", "--html", file)
    text = file.read_text()
    parser = _Links()
    parser.feed(text)
    assert all(link.startswith("#") for link in parser.links)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe"} & set(parser.elements)
    return text, parser


def test_page_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    text, parser = _page(tmp_path)
    assert "svg" not in parser.elements and "pip install matplotlib" in text
    for expected in ("1x8x16-&gt;32", "Where we lose", "needs a CUDA device", torch.__version__):
        assert expected in text


@needs_matplotlib
def test_page_with_plots(tmp_path: Path) -> None:
    text, parser = _page(tmp_path)
    assert parser.elements.count("svg") == 3
    for expected in ("speed-up of styleforge", "time of a call, us", "operations a byte", "over eager"):
        assert expected in text
    ids = re.findall(r' id="([^"]+)"', "".join(re.findall(r"<clipPath[^>]*>", text)))
    assert len(ids) == len(set(ids)) >= 3  # on one page, equal ids of two plots would cut the second wrongly


def test_page_of_an_earlier_run(tmp_path: Path) -> None:
    kept, first, later = (tmp_path / name for name in ("bench.json", "first.html", "later.html"))
    arguments = ("conv", "--case", "1x4->8@8x8k3s1", "--against", "eager,cudagraph")
    now = _bench(*arguments, "--json", kept, "--html", first).stdout
    shown = _bench("--from", kept, "--html", later).stdout
    assert first.read_text() == later.read_text()
    table = now[: now.index("floor:")].strip()
    assert "where we lose" in table and table in shown
    kept.write_text('{"format": 0}')
    assert "format must be 1, got 0" in _bench("--from", kept, code=2).stderr
    assert "is not what --json writes" in _bench("--from", tmp_path / "no.json", code=2).stderr


# --- several at once ------------------------------------------------------------------------------


def test_turns(tmp_path: Path) -> None:
    """While another measures, this one prepares and waits; while another prepares, it does not measure."""
    file = tmp_path / "turns"
    other, another = turns.Turns(file), turns.Turns(file)
    free = threading.Event()

    def work() -> None:
        other.alone()
        free.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert not free.wait(0.3)
    another.done()
    assert free.wait(10)
    thread.join()
    assert turns.prepared(file) == {os.getpid()} and not turns.prepared(tmp_path / "none")
    late: list[turns.Turns] = []
    thread = threading.Thread(target=lambda: late.append(turns.Turns(file)))
    thread.start()
    thread.join(0.3)
    assert not late
    other.done()
    thread.join(10)
    assert late


def test_cases_that_are_prepared_first(tmp_path: Path) -> None:
    """The same figures come of it, also where cases have the same code."""
    texts = ("--case", "conv 1x4->8@9x8k3s2", "--case", "conv 1x4->8@9x9k3s1", "--case", "ffn 1x8x16->32")
    data, _ = _json(tmp_path, *texts, "--turns", tmp_path / "turns")
    found = [case for table in data["tables"] for case in table["cases"]]
    assert len(found) == 3 and data["passed"]
    for case in found:
        assert set(case["contenders"]) == {"styleforge", "eager", "compile"} and case["floor_us"] > 0


@pytest.mark.parametrize("backward", [False, True])
def test_autocast(tmp_path: Path, backward: bool) -> None:
    arguments = ["conv", "--case", "1x4->8@9x8k3s2", "--against", "eager"]
    arguments += ["--dtype", "bfloat16", "--autocast", *["--backward"] * backward]
    data, _ = _json(tmp_path, *arguments)
    assert data["settings"]["autocast"] and ", autocast" in data["tables"][0]["title"]
    (case,) = data["tables"][0]["cases"]
    for contender in case["contenders"].values():  # bfloat16 was used, not float32
        assert 1e-4 < contender["check"]["error"] < 3e-1


def test_exact_attention_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.parse("attention", "standard", "2x24x16/2")
    plain, ours = (module.eval() for module in case.modules())
    problem = contenders.Problem(case, plain, ours, [case.input(torch.device("cpu"), torch.float32)], None)
    with torch.no_grad():
        (whole,) = correctness.exact_results(problem)
        monkeypatch.setattr(correctness, "_MOST_SCORES", 500)
        (parts,) = correctness.exact_results(problem)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-13)


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ffn", "--against", "tensorflow"), "got 'tensorflow'"),
        (("ffn", "--case", "1x2"), "a case of ffn is written like 8x1024x512->2048, got '1x2'"),
        (("--case", "1x2"), "--case needs one operator"),
        (("ffn", "--case", "conv 1x4->8@8x8k3s1"), "with one of ffn, got 'conv 1x4->8@8x8k3s1'"),
        (("attention", "--mode", "residual"), "attention has no residual mode"),
        (("ffn", "--dtype", "int8"), "got 'int8'"),
        (("ffn", "--autocast"), "--autocast needs --dtype float16 or bfloat16"),
        (("ffn", "--json", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str) -> None:
    result = _bench(*arguments, code=2)
    assert said in result.stderr and result.stdout == ""


def test_precision_flags_come_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with precision.precision_flags("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    with precision.precision_flags("ieee"):
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("operator", "mode", "text"), TINY)
def test_on_the_gpu(tmp_path: Path, operator: str, mode: str, text: str, backward: bool) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", operator, "--mode", mode, "--case", text, "--against", "eager,cudagraph"]
    arguments += ["--config", "fast", "--seconds", "0", "--device", "cuda", "--json", str(file)]
    result = runner.invoke(app, arguments + ["--backward"] * backward, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (case,) = json.loads(file.read_text())["tables"][0]["cases"]
    assert case["buffers"] > 1
    assert set(case["contenders"]) == {"styleforge", "eager", "cudagraph"}
    for name, contender in case["contenders"].items():
        assert contender["gpu_clock"] == ("events" if name == "cudagraph" else "graph")
        assert all(contender[clock]["median"] > 0 for clock in ("gpu", "host", "wall"))
        assert (contender["peak_bytes"] or 0) > 0 or name == "cudagraph"
