"""`styleforge bench`: how fast the operators are here, next to what else can run the same layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from styleforge.cli._errors import FAILURE, UsageError, one_line, with_clear_errors

if TYPE_CHECKING:
    from rich.console import Console

    from styleforge.bench.cases import Case
    from styleforge.bench.floors import Rates
    from styleforge.bench.measure import CaseResult, Settings
    from styleforge.bench.turns import Turns


class Operator(str, Enum):
    """What to measure."""

    attention = "attention"
    ffn = "ffn"
    instance_norm = "instance-norm"
    conv = "conv"
    transformer_net = "transformer-net"
    all = "all"


class Config(str, Enum):
    """How often."""

    fast = "fast"
    standard = "standard"
    comprehensive = "comprehensive"


class Mode(str, Enum):
    """Which shapes."""

    standard = "standard"
    real_world = "real-world"
    residual = "residual"


class Precision(str, Enum):
    """Of float32 on the GPU."""

    ieee = "ieee"
    tf32 = "tf32"


# Warm-up, iterations, and the most seconds that one contender of one case may take of either.
_CONFIGS = {
    Config.fast: (5, 20, 2.0),
    Config.standard: (20, 100, 10.0),
    Config.comprehensive: (50, 500, 60.0),
}


@with_clear_errors
def bench(
    operators: Annotated[
        list[Operator] | None, typer.Argument(metavar="[OPERATOR]...", help="Default: all.")
    ] = None,
    config: Annotated[
        Config,
        typer.Option(
            help="Warm-up and iterations: fast 5 and 20, standard 20 and 100, comprehensive 50 and 500."
        ),
    ] = Config.standard,
    suite: Annotated[bool, typer.Option("--suite", help="More and larger cases.")] = False,
    mode: Annotated[
        Mode,
        typer.Option(
            help="standard: a spread of shapes. real-world: the layers of known networks (style transfer at "
            "512x512 and video sizes, ViT-B, BERT-base). residual: with a shortcut (conv, ffn, "
            "instance-norm)."
        ),
    ] = Mode.standard,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            metavar="SHAPE",
            help="Measure this instead, written as in the tables: attention 2x256x128/4, "
            "ffn 8x1024x512->2048, instance-norm 4x64x256x256, conv 1x64->128@128x128k3s2 "
            "(residual: 1x128@64x64), transformer-net 1x512x512. Can be repeated. For several operators, "
            "each with its operator in front: 'conv 1x64->64@64x64k3s1'.",
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Any of eager, compile, cudagraph, onnxruntime, jax (commas between them), or all; "
            "what is missing is named."
        ),
    ] = "eager,compile",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    precision: Annotated[
        Precision,
        typer.Option(help="float32 on the GPU, for every contender: ieee has TF32 off, tf32 has it on."),
    ] = Precision.ieee,
    backward: Annotated[
        bool,
        typer.Option("--backward", help="A training step: forward, and gradients of input and parameters."),
    ] = False,
    autocast: Annotated[
        bool,
        typer.Option(
            "--autocast", help="Mixed precision: parameters in float32, layers by torch.autocast in --dtype."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Most seconds for the iterations of one contender and case; 3 are always made. Default: "
            "fast 2, standard 10, comprehensive 60.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one page with tables and plots (matplotlib)."),
    ] = None,
    turns_file: Annotated[
        Path | None,
        typer.Option(
            "--turns",
            metavar="FILE",
            help="For several at once that name the same file: all compile and check at the same time, then "
            "each measures alone.",
        ),
    ] = None,
    earlier: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Measure nothing: show what an earlier run wrote with --json, and make --html of it.",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure speed next to PyTorch and others; every result is first compared with float64.

    On a GPU: GPU time inside a CUDA graph, over inputs that the L2 cache does not hold, and host time apart.
    On the CPU: wall-clock time, the contenders in turns. Exit code 1 where a result of styleforge is wrong or
    differs from run to run.
    """
    chosen = list(dict.fromkeys(operators or [Operator.all]))
    for file in (json_file, html_file, turns_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {file.absolute().parent} to write {file.name} to")
    if earlier is not None:
        _show(earlier, html_file)
        return
    from styleforge.bench.turns import Turns

    turns = Turns(turns_file)  # before the imports: none may come to its turn while another still starts
    import torch

    from styleforge.bench.cases import OPERATORS
    from styleforge.bench.measure import Settings
    from styleforge.cli._console import note, stderr_console
    from styleforge.cli._engine import choose_device, choose_dtype

    where = choose_device(device)
    if dtype == "auto":
        raise UsageError("--dtype must be float32, float16 or bfloat16, got 'auto'")
    warmup, iterations, most = _CONFIGS[config]
    settings = Settings(
        device=where,
        dtype=choose_dtype(dtype, where),
        precision=precision.value,
        backward=backward,
        warmup=warmup,
        iterations=iterations,
        seconds=most if seconds is None else seconds,
        against=_against(against),
        autocast=autocast,
    )
    if autocast and settings.dtype == torch.float32:
        raise UsageError("--autocast needs --dtype float16 or bfloat16")
    names = list(OPERATORS) if Operator.all in chosen else [operator.value for operator in chosen]
    console = stderr_console()
    work = {name: _cases(name, mode.value, suite, cases, names) for name in names}
    if cases:
        work = {name: found for name, found in work.items() if found}
    for name in [name for name, found in work.items() if not found]:
        note(console, f"{name} has no {mode.value} mode")
        del work[name]
    if not work:
        raise UsageError(f"nothing to measure: {', '.join(names)} has no {mode.value} mode")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    options = {"config": config.value, "suite": suite, "mode": mode.value}

    def save(tables: dict[str, list[CaseResult]], rates: Rates) -> None:
        _write(tables, settings, rates, options, json_file, html_file)

    tables = _run(work, settings, console, turns, save)
    turns.done()
    _say_written(json_file, html_file)
    failed = [result for results in tables.values() for result in results if result.failures]
    if failed:
        listed = ", ".join(f"{result.case.operator} {result.case.name}" for result in failed)
        typer.secho("error: ", err=True, fg=typer.colors.RED, bold=True, nl=False)
        typer.echo(f"wrong or not repeatable: {listed}", err=True)
        raise typer.Exit(FAILURE)


def _against(text: str) -> tuple[str, ...]:
    from styleforge.bench.contenders import OTHERS

    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return OTHERS
    for name in names:
        if name not in OTHERS:
            raise UsageError(f"--against takes {', '.join(OTHERS)}, or all, got '{name}'")
    if not names:
        raise UsageError(f"--against needs one of {', '.join(OTHERS)}")
    return tuple(dict.fromkeys(names))


def _cases(name: str, mode: str, suite: bool, given: list[str] | None, names: list[str]) -> list[Case]:
    from styleforge.bench.cases import cases, parse

    if not given:
        return cases(name, mode, suite)
    texts: list[str] = []
    for text in given:
        operator, _, shape = text.rpartition(" ")
        if (operator or (names[0] if len(names) == 1 else "")) not in names:
            raise UsageError(
                "--case needs one operator: styleforge bench OPERATOR --case SHAPE, or --case 'OPERATOR "
                f"SHAPE' with one of {', '.join(names)}, got '{text}'"
            )
        if operator in ("", name):
            texts.append(shape)
    try:
        return [parse(name, mode, text) for text in texts]
    except ValueError as error:
        raise UsageError(f"--case: {error}") from error


def _run(
    work: dict[str, list[Case]],
    settings: Settings,
    console: Console,
    turns: Turns,
    save: Callable[[dict[str, list[CaseResult]], Rates], None],
) -> dict[str, list[CaseResult]]:
    """Measures; prints and saves each operator's tables when it is done, so an interrupt loses little."""
    from styleforge.bench.contenders import keep_all_compiled
    from styleforge.bench.floors import measure_rates
    from styleforge.bench.measure import Prepared, measure, prepare, time_prepared
    from styleforge.bench.precision import precision_flags
    from styleforge.bench.tables import print_results
    from styleforge.cli._console import progress_bar

    output = _stdout()
    tables: dict[str, list[CaseResult]] = {}
    kind = str(settings.dtype)[6:]
    if settings.device.type == "cuda" and kind == "float32":
        kind += f" ({settings.precision})"
    with precision_flags(settings.precision), progress_bar(console, "case") as progress:
        task = progress.add_task("copy and product rates", total=sum(map(len, work.values())))

        def tell_of(case: Case) -> Callable[[str], None]:
            return lambda what: progress.update(task, description=f"{case.operator} {case.name}: {what}")

        prepared: dict[Case, Prepared] = {}
        if turns.with_others:
            keep_all_compiled()
            for case in itertools.chain.from_iterable(work.values()):
                prepared[case] = prepare(case, settings, tell_of(case))
            turns.alone()
        rates = measure_rates(settings.device, settings.dtype)
        for name, found in work.items():
            results: list[CaseResult] = []
            for case in found:
                if case in prepared:
                    results.append(time_prepared(prepared.pop(case), settings, rates, tell_of(case)))
                else:
                    results.append(measure(case, settings, rates, tell_of(case)))
                progress.advance(task)
            step = "forward and backward" if settings.backward else "inference"
            step += ", autocast" if settings.autocast else ""
            title = f"{name}, {found[0].mode}: {step}, {kind}, {settings.device}"
            tables[title] = results
            print_results(output, title, results, settings.device.type == "cuda")
            save(tables, rates)
    output.print(
        f"\nfloor: {rates.copy / 1e9:,.0f} GB/s (copy), {rates.product / 1e12:,.2f} TFLOP/s "
        f"({rates.product_is}); more than 100 %: a cache held the tensors, fewer operations were "
        "needed, or others kept the machine busy while the rates were measured",
        soft_wrap=True,
        highlight=False,
    )
    return tables


def _stdout() -> Console:
    from rich.console import Console

    output = Console()
    return output if output.is_terminal else Console(width=200)  # a file or a pipe has no 80 columns


def _say_written(json_file: Path | None, html_file: Path | None) -> None:
    from styleforge.bench import plots
    from styleforge.cli._console import note, stderr_console

    for file in (json_file, html_file):
        if file is not None:
            typer.echo(f"wrote {file}")
    if html_file is not None and not plots.available():
        note(stderr_console(), f"{html_file} has no plots: pip install matplotlib")


def _show(earlier: Path, html_file: Path | None) -> None:
    """The tables, and the page, of a run that is over."""
    import json

    from styleforge.bench import report_html, report_json
    from styleforge.bench.tables import print_results

    try:
        data = json.loads(earlier.read_text(encoding="utf-8"))
        tables, rates = report_json.read(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--from {earlier} is not what --json writes: {one_line(error)}") from error
    output = _stdout()
    output.print(f"{data['environment']['device']}, {data['date']}", soft_wrap=True, highlight=False)
    for title, results in tables.items():
        print_results(output, title, results, data["settings"]["device"] != "cpu")
    if html_file is not None:
        html_file.write_text(report_html.page(data, tables, rates), encoding="utf-8")
        _say_written(None, html_file)


def _write(
    tables: dict[str, list[CaseResult]],
    settings: Settings,
    rates: Rates,
    options: Mapping[str, object],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    if json_file is None and html_file is None:
        return
    import json

    from styleforge.bench import report_html, report_json
    from styleforge.cli.info import cpu_model, package_version

    machine = {name: package_version(name) or "not installed" for name in ("onnxruntime", "jax")}
    if settings.device.type == "cpu":
        machine["device"] = cpu_model()
    data = report_json.report(tables, settings, rates, options, machine)
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if html_file is not None:
        html_file.write_text(report_html.page(data, tables, rates), encoding="utf-8")
