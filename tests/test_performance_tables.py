"""The README's performance tables: made of the results that are kept, and complete."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from styleforge.bench import floors, report_json
from styleforge.cli import app

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import goals  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
import verify  # noqa: E402

Data = dict[str, Any]


def test_the_tables_in_the_readme_are_those_of_the_kept_results() -> None:
    kept = tables.load()
    assert kept, "benchmarks/ holds no results"
    assert tables.table_in(tables.README.read_text()) == tables.render(kept), "run `make performance-tables`"
    assert tables.GOALS.read_text() == tables.render_goals(kept), "run `make performance-tables`"


def test_kept_results_can_be_shown_again() -> None:
    for file in sorted(tables.FOLDER.glob("*.json")):
        data = json.loads(file.read_text())
        results, _ = report_json.read(data)
        assert results and data["passed"] is True
        assert {"styleforge", "pytorch", "device"} <= set(data["environment"]) and data["date"] >= "2026"


def test_what_verify_printed_is_of_all_cases_and_all_passed() -> None:
    from styleforge.verify import OPERATORS, grid

    count = sum(len(grid(operator, "full")) for operator in OPERATORS)
    kept = sorted(verify.FOLDER.glob("*.txt"))
    assert kept
    for file in kept:
        text = file.read_text()
        assert re.match(r"\d{4}-\d\d-\d\d: styleforge verify all --mode full .*: exit code 0\n", text), file
        assert re.search(rf"^Total tests: +{count}\nPassed: +{count}\nFailed: +0$", text, re.MULTILINE), file
        assert text.count(" passed") == count and "FAILED" not in text
    devices = {file.name.rpartition("-")[0] for file in kept}
    for device in devices:
        dtypes = {file.stem.rpartition("-")[2] for file in kept if file.name.startswith(device)}
        assert dtypes in ({*verify.ALONE}, {*verify.ALONE, *verify.TOGETHER})


# --- rendering ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """What the command writes for two small cases of the CPU."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "measure_rates", lambda *_: floors.Rates(1e10, 1e11, "assumed"))
        texts = ("--case", "ffn 1x8x16->32", "--case", "conv 1x4->8@9x8k3s2")
        options = ("--config", "fast", "--seconds", "0", "--device", "cpu", "--against", "eager,cudagraph")
        done = CliRunner().invoke(app, ["bench", *texts, *options, "--json", str(file)])
    assert done.exit_code == 0, done.output
    found: Data = json.loads(file.read_text())
    return found


def _shown(data: Data, **settings: object) -> Data:
    """The same as a GPU's run of two cases that the tables show: 20 us and 40 us, with even ratios."""
    data = copy.deepcopy(data)
    data["settings"] |= {"device": "cuda:0", "dtype": "float16", "backward": False} | settings
    data["environment"] |= {"device": "NVIDIA X1", "cuda": "13.0", "cudnn": 91000, "pytorch": "2.11.0"}
    data["date"] = "2026-11-23T10:00:00+00:00"
    shown = {"ffn": "8x1024x512->2048", "conv": "1x128->128@128x128k3s1"}
    for table in data["tables"]:
        for case in table["cases"]:
            case["case"] = shown[case["operator"]]
            ours = case["contenders"]["styleforge"]
            for name, factor in (("styleforge", 1), ("eager", 2), ("compile", 1.25)):
                new = case["contenders"][name] = copy.deepcopy(ours)
                time = (20 if case["operator"] == "conv" else 40) * factor
                new["gpu"] = dict(new["wall"], median=time)
                new["throughput"]["percent_of_floor"] = 61.4
                new["memory_format"] = "channels_last" if case["operator"] == "conv" else "contiguous"
                new["formats"] = {new["memory_format"]: time, "contiguous": time}
                new["path"] = f"{case['operator']}:cuda:sm90"
            case["speedups"] = {"eager": 2.0, "compile": 1.25}
    return data


def _folder(path: Path, *runs: Data) -> list[tables.Run]:
    for index, data in enumerate(runs):
        (path / f"{index}.json").write_text(run.compact(data))
    return tables.load(path)


def test_a_row(tmp_path: Path, measured: Data) -> None:
    text = tables.render(_folder(tmp_path, _shown(measured)))
    assert "**NVIDIA X1** (2026-11-23, styleforge 0.1.0, PyTorch 2.11.0, CUDA 13.0, cuDNN 91000)" in text
    assert "| float16, forward | styleforge | of eager | of `torch.compile` | of the floor | path |" in text
    name, path = "conv 3x3 + norm + ReLU 1x128x128x128", "`conv:cuda:sm90`, channels_last"
    assert f"| {name} | 20 us | 0.50 | 0.80 | 61 % | {path} |" in text
    assert "| FFN 8x1024x512->2048 | 40 us | 0.50 | 0.80 | 61 % | `ffn:cuda:sm90` |" in text
    assert text.rstrip().endswith("Where it loses: in none of 2 cases.")


def test_precisions_steps_and_devices(tmp_path: Path, measured: Data) -> None:
    gpu = [
        _shown(measured, dtype="float32", precision="ieee"),
        _shown(measured, dtype="float32", precision="tf32"),
        _shown(measured, dtype="bfloat16"),
        _shown(measured),
        _shown(measured, backward=True),
        _shown(measured, backward=True, dtype="float32", precision="tf32"),
    ]
    text = tables.render(_folder(tmp_path, measured, *gpu))
    heads = [line for line in text.splitlines() if line.startswith("| ") and "forward" in line]
    assert heads == [
        "| float16, forward | styleforge | of eager | of `torch.compile` | of the floor | path |",
        "| the same, forward | bfloat16 | TF32 | float32 |",
        "| float16, forward and backward | styleforge | of eager | of `torch.compile` | of the floor |",
        "| the same, forward and backward | TF32 |",
        "| float32, forward | styleforge | of eager | of `torch.compile` | path |",
    ]
    assert "| FFN 8x1024x512->2048 | 40 us (0.50, 0.80) | 40 us (0.50, 0.80) | 40 us (0.50, 0.80) |" in text
    assert text.index("NVIDIA X1") < text.index(f"**{measured['environment']['device']}**")


def test_the_newest_counts(tmp_path: Path, measured: Data) -> None:
    old, new = _shown(measured), _shown(measured)
    new["date"] = "2026-12-01T10:00:00+00:00"
    new["tables"][0]["cases"][0]["contenders"]["styleforge"]["gpu"]["median"] = 1234.5
    (found,) = _folder(tmp_path, new, old)
    assert found.data["date"] == new["date"]
    text = tables.render([found])
    assert "2026-12-01" in text and "1234 us" in text and "2026-11-23" not in text


def test_losses(tmp_path: Path, measured: Data) -> None:
    data = _shown(measured)
    ffn, conv = (table["cases"][0] for table in data["tables"])
    ffn["speedups"]["compile"] = 0.8
    conv["contenders"]["styleforge"]["formats"] = {"channels_last": 20, "contiguous": 60}
    conv["contenders"]["compile"]["formats"] = {"channels_last": 25, "contiguous": 24}
    text = tables.render(_folder(tmp_path, data))
    assert "| **1.25** |" in text
    assert text.partition("Where it loses")[2] == (
        ", in 2 of 2 cases:\n\n"
        "- conv 3x3 + norm + ReLU 1x128x128x128, float16: 2.50 times `torch.compile` where the input is "
        "contiguous\n"
        "- FFN 8x1024x512->2048, float16: 1.25 times `torch.compile`\n"
    )
    ffn["failures"] = ["contiguous: wrong result: relative error 1, allowed 1e-05"]
    ffn["contenders"], ffn["speedups"] = {}, {}
    text = tables.render(_folder(tmp_path, data))
    assert "| FFN 8x1024x512->2048 | not measured | - | - | - | - |" in text
    assert "- FFN 8x1024x512->2048, float16: contiguous: wrong result" in text


def test_many_losses_are_counted(tmp_path: Path, measured: Data) -> None:
    data = _shown(measured)
    ffn = data["tables"][0]["cases"]
    for factor in range(1, 13):
        ffn.append(copy.deepcopy(ffn[0]) | {"speedups": {"eager": 1 / (1 + factor / 10)}})
    text = tables.render(_folder(tmp_path, data)).partition("Where it loses")[2]
    assert text.startswith(", in 12 of 14 cases:") and "4 more, 1.40 to 1.10 times" in text
    assert text.count("\n- ") == tables.MOST_LOSSES + 1


@pytest.mark.parametrize(
    ("operator", "shape", "said"),
    [
        ("conv", "1x64->128@128x96k3s2", "conv 3x3 + norm + ReLU 1x64x128x96 to 128 channels, stride 2"),
        ("conv", "1x128@64x64", "residual block 1x128x64x64"),
        ("attention", "2x256x128/4", "attention 2x256x128, 4 heads"),
        ("instance-norm", "4x64x256x256", "instance norm + ReLU 4x64x256x256"),
        ("transformer-net", "1x512x256", "TransformerNet 1x3x512x256"),
    ],
)
def test_names(operator: str, shape: str, said: str) -> None:
    assert tables.name(operator, shape) == said


@pytest.mark.parametrize(("time", "said"), [(4.4321, "4.43 us"), (39.84, "39.8 us"), (1234.5, "1234 us")])
def test_times(time: float, said: str) -> None:
    assert tables._time(time) == said
    assert tables._time(48_250) == "48.2 ms" and tables._time(2_350_000) == "2.35 s"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json is not what"):
        tables.load(tmp_path)


# --- measuring ------------------------------------------------------------------------------------


def test_compact_loses_nothing_but_digits(measured: Data) -> None:
    text = run.compact(measured)
    again = json.loads(text)
    assert run.compact(again) == text and len(text) < len(json.dumps(measured, indent=1))
    assert [t["title"] for t in again["tables"]] == [t["title"] for t in measured["tables"]]
    ours = [data["tables"][1]["cases"][0]["contenders"]["styleforge"] for data in (measured, again)]
    assert ours[1]["wall"]["median"] == pytest.approx(ours[0]["wall"]["median"], rel=1e-4)
    assert ours[1]["path"] == ours[0]["path"]


def test_a_run_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SHOWN", (("ffn", "1x8x16->32"), ("attention", "1x2048x4096/32")))
    arguments = ["--device", "cpu", "--against", "eager", "--seconds", "0", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-float32.json")
    (kept,) = tables.load(tmp_path)
    assert not kept.on_gpu and kept.precision == "float32" and not kept.training
    assert [entry["case"] for entry in kept.entries()] == ["1x8x16->32"]  # the other takes a CPU too long


def test_parts_of_a_run_are_one_file(measured: Data) -> None:
    first, second = copy.deepcopy(measured), copy.deepcopy(measured)
    for data, kept in ((first, 0), (second, 1)):
        data["tables"] = [data["tables"][kept]]
    assert run.merge([first, second])["tables"] == measured["tables"]
    both = run.merge([copy.deepcopy(first), copy.deepcopy(first) | {"passed": False}])
    assert [case["case"] for case in both["tables"][0]["cases"]] == ["1x8x16->32"] * 2 and not both["passed"]


def test_cases_that_are_not_measured_again_stay(measured: Data) -> None:
    old, new = copy.deepcopy(measured), copy.deepcopy(measured)
    old["date"] = "2026-01-01T00:00:00+00:00"
    case = copy.deepcopy(old["tables"][0]["cases"][0]) | {"case": "1x8x24->32"}
    old["tables"][0]["cases"].append(case)
    old["tables"][0]["losses"] = ["1x8x16->32: 2 times", "1x8x24->32: 3 times"]
    new["tables"] = [new["tables"][0] | {"losses": []}]
    both = run.again(old, copy.deepcopy(new))
    assert [(c["case"], c.get("date")) for c in both["tables"][0]["cases"]] == [
        ("1x8x16->32", None),
        ("1x8x24->32", old["date"]),
    ]
    assert both["tables"][0]["losses"] == ["1x8x24->32: 3 times"] and both["date"] == new["date"]
    assert [t["title"] for t in both["tables"]] == [t["title"] for t in old["tables"]]
    old["environment"]["pytorch"] = "1.0"
    assert run.again(old, copy.deepcopy(new)) == new


def test_parts_hold_every_case_once() -> None:
    for name in run.RUNS:
        found = run.cases(name, suite=name == "float16")
        made = run.parts(name, found)
        assert sorted(case for part in made for case in part) == sorted(found) and all(made)
        assert {*goals.cases_of(name)} <= {*found}
    assert set(run.ONLY_GOALS) < set(run.RUNS)
    assert {goal.run for goal in goals.GOALS} <= set(run.RUNS)


def test_time_is_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--out", str(tmp_path), "--total", "0.5"]
    assert run.main(given) == 1 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "no time left for float32-0" in said and "float32: nothing measured" in said


def test_a_run_that_measures_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["float16", "--device", "cuda:77", "--out", str(tmp_path)]
    assert run.main(given) == 1 and not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "float16: nothing measured" in said and "cuda" in said
    with pytest.raises(SystemExit):
        run.main(["float8"])


def test_every_shown_case_can_be_measured() -> None:
    from styleforge.bench.cases import parse

    asked = [(goal.operator, goal.shape) for goal in goals.GOALS]
    for operator, shape in (*tables.SHOWN, *tables.SHOWN_TRAINING, *asked):
        assert parse(operator, "standard", shape).name == shape
    assert torch.float16 in {getattr(torch, o[1]) for o in run.RUNS.values() if o[0] == "--dtype"}


# --- goals ----------------------------------------------------------------------------------------


def _entry(floor_is: str = "memory", **times: float) -> Data:
    """A case of attention: each contender's GPU time, twice that on the host, and 1 MB a microsecond."""

    def contender(time: float) -> Data:
        share = {"percent_of_floor": 80.0}
        clocks = {"gpu": {"median": time}, "host": {"median": 2 * time}}
        return {**clocks, "throughput": share, "peak_bytes": int(time * 2**20)}

    contenders = {name: contender(time) for name, time in times.items()}
    return {"input_shape": [1, 1024, 256], "floor_is": floor_is, "contenders": contenders}


@pytest.mark.parametrize(
    ("figure", "others", "asked", "reached", "met"),
    [
        ("gpu", ("eager", "compile"), 0.5, 0.5, True),
        ("gpu", ("eager",), 0.2, 0.25, False),
        ("host", ("compile",), 0.5, 0.5, True),
        ("peak", ("eager",), 1.0, 0.25, True),
        ("copy", (), 92.0, 80.0, False),
        ("held", (), 0.4, 0.6, False),  # 2 MB of the call and 1 MB of the input, of 5 MB
    ],
)
def test_a_goal(figure: str, others: tuple[str, ...], asked: float, reached: float, met: bool) -> None:
    goal = goals.Goal("", "float32", "attention", "1x1024x256/4", figure, asked, others)
    found = goals.reached(goal, _entry(styleforge=2, eager=8, compile=4))
    assert found == pytest.approx(reached) and goals.met(goal, found) is met


def test_goals_that_were_not_measured() -> None:
    goal = goals.Goal("", "float32", "attention", "1x1024x256/4", "gpu", 0.5)
    assert goals.reached(goal, _entry(eager=8)) is None and goals.reached(goal, _entry(styleforge=2)) is None
    rate = goals.Goal("", "float32", "attention", "1x1024x256/4", "copy", 92.0, ())
    assert goals.reached(rate, _entry("arithmetic", styleforge=1)) is None


def test_the_goals_page(tmp_path: Path, measured: Data) -> None:
    text = tables.render_goals(_folder(tmp_path, _shown(measured)))
    name = "conv 3x3 + norm + ReLU 1x128x128x128, float16"
    assert f"| {name} | 20 | 40 | 25 | **0.80** | 0.55 |" in text
    assert "| FFN 8x1024x512->2048, float16 | 40 | 80 | 50 | **0.80** | 0.78 |" in text
    assert "| FFN 8x1024x512->2048, bfloat16 | - | - | - | not measured | 0.78 |" in text
    asked = sum(goal.asked is not None for goal in goals.GOALS)
    assert f"0 of {asked} goals are reached." in text
