"""`styleforge verify`: the operators against float64 on this machine."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from styleforge.cli._errors import FAILURE, UsageError, WorkError, with_clear_errors

if TYPE_CHECKING:
    from styleforge.verify import Case

# Tables keep their rows whole in a file or a pipe, which have no width of their own.
_WIDTH = 160


class What(str, Enum):
    """Which operator."""

    attention = "attention"
    ffn = "ffn"
    instance_norm = "instance-norm"
    conv = "conv"
    all = "all"


class Mode(str, Enum):
    """Which cases."""

    quick = "quick"
    full = "full"
    specific = "specific"


class DType(str, Enum):
    """What is verified against float64."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Precision(str, Enum):
    """Arithmetic of float32 on the GPU."""

    ieee = "ieee"
    tf32 = "tf32"


_SPECIFIC = "Options of --mode specific"


def _number(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=_SPECIFIC, metavar="N")


def _switch(names: str, help: str) -> Any:
    return typer.Option(names, help=help, rich_help_panel=_SPECIFIC)


@with_clear_errors
def verify(
    what: Annotated[What, typer.Argument(help="The operator.", metavar="[OPERATOR]")] = What.all,
    mode: Annotated[
        Mode,
        typer.Option(
            help="quick: three cases an operator. full: 25 and more. specific: the one given below."
        ),
    ] = Mode.quick,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Of every tensor.")] = DType.float32,
    precision: Annotated[
        Precision, typer.Option(help="Of float32 on the GPU, PyTorch's and styleforge's.")
    ] = Precision.ieee,
    backward: Annotated[
        bool, typer.Option("--backward/--forward-only", help="Whether to check the gradients as well.")
    ] = True,
    timed: Annotated[bool, typer.Option("--times/--no-times", help="Whether to measure times.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all numbers as JSON.")
    ] = None,
    batch_size: Annotated[int | None, _number("Of every operator.")] = None,
    seq_len: Annotated[int | None, _number("Tokens: attention, ffn.")] = None,
    embed_dim: Annotated[int | None, _number("Attention, ffn.")] = None,
    num_heads: Annotated[int | None, _number("Attention.")] = None,
    hidden_dim: Annotated[int | None, _number("Ffn; 4 x --embed-dim by default.")] = None,
    channels: Annotated[int | None, _number("Instance-norm.")] = None,
    in_channels: Annotated[int | None, _number("Conv.")] = None,
    out_channels: Annotated[int | None, _number("Conv.")] = None,
    height: Annotated[int | None, _number("Pixels: instance-norm, conv.")] = None,
    width: Annotated[int | None, _number("Pixels: instance-norm, conv.")] = None,
    kernel_size: Annotated[int | None, _number("Conv.")] = None,
    stride: Annotated[int | None, _number("Conv.")] = None,
    padding: Annotated[int | None, _number("Conv.")] = None,
    upsample: Annotated[int | None, _number("Conv: 1 or 2.")] = None,
    padding_mode: Annotated[
        str | None, typer.Option(help="Conv: zeros, reflect or replicate.", rich_help_panel=_SPECIFIC)
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="Ffn: gelu, gelu_tanh, relu or silu. Instance-norm, conv: none, relu, leaky_relu, silu, "
            "sigmoid or tanh.",
            rich_help_panel=_SPECIFIC,
        ),
    ] = None,
    bias: Annotated[bool | None, _switch("--bias/--no-bias", "Attention, ffn.")] = None,
    causal: Annotated[bool | None, _switch("--causal/--no-causal", "Attention.")] = None,
    padding_mask: Annotated[
        bool | None, _switch("--padding-mask/--no-padding-mask", "Attention: a key padding mask.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            help="Attention: auto, v1 (for short sequences) or v2 (tiles, for any).",
            rich_help_panel=_SPECIFIC,
        ),
    ] = None,
    affine: Annotated[bool | None, _switch("--affine/--no-affine", "Instance-norm.")] = None,
    residual: Annotated[
        bool | None, _switch("--residual/--no-residual", "Ffn, instance-norm, conv: a tensor to add.")
    ] = None,
    channels_last: Annotated[
        bool | None, _switch("--channels-last/--contiguous", "Instance-norm, conv: the memory format.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check results and gradients against float64, and that two runs give the same bits; measure times.

    A case passes if styleforge's error against float64 is about as small as PyTorch's own in the same dtype
    (RMS within 2 times, largest within 4 times, and a few rounding units). Exit code 1 if a case fails.

    styleforge verify attention --mode specific --batch-size 4 --seq-len 256 --embed-dim 128 --num-heads 8
    """
    names = (
        "batch_size seq_len embed_dim num_heads hidden_dim channels in_channels out_channels height width "
        "kernel_size stride padding upsample padding_mode activation bias causal padding_mask version "
        "affine residual channels_last"
    )
    here = locals()
    given = {name: here[name] for name in names.split() if here[name] is not None}
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise UsageError(f"--json: cannot write {json_file}: no such folder, or a folder itself")
    cases = _cases(what, mode, given)
    outcomes_failed = _run(
        cases, mode, device, dtype.value, precision.value, json_file, backward=backward, timed=timed
    )
    if outcomes_failed:
        raise typer.Exit(FAILURE)


def _cases(what: What, mode: Mode, given: dict[str, Any]) -> list[Case]:
    from styleforge.verify import OPERATORS, grid, specific

    names = list(OPERATORS) if what is What.all else [what.value]
    if mode is not Mode.specific:
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise UsageError(f"{option} needs --mode specific")
        return [case for name in names for case in grid(name, mode.value)]
    if what is What.all:
        raise UsageError(f"--mode specific needs one operator: {', '.join(names)}")
    try:
        return [specific(what.value, given)]
    except ValueError as error:
        raise UsageError(str(error)) from None


def _run(
    cases: list[Case],
    mode: Mode,
    device_name: str,
    dtype_name: str,
    precision: str,
    json_file: Path | None,
    *,
    backward: bool,
    timed: bool,
) -> int:
    """Runs and prints; how many failed."""
    import json
    from itertools import groupby

    import torch
    from rich.console import Console

    from styleforge._version import __version__
    from styleforge.cli._console import progress_bar, stderr_console
    from styleforge.cli._engine import choose_device
    from styleforge.verify import Outcome, run_case
    from styleforge.verify.report import as_json, summary, summary_text, table

    device = choose_device(device_name)
    dtype: torch.dtype = getattr(torch, dtype_name)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _threads()
    arithmetic = (
        f"{dtype_name}, {precision}" if device.type == "cuda" and dtype_name == "float32" else dtype_name
    )
    console.print(
        f"styleforge {__version__}, PyTorch {torch.__version__}, {device} ({hardware}), {arithmetic}: "
        f"{len(cases)} case{'s' * (len(cases) > 1)}\n",
        highlight=False,
        soft_wrap=True,
    )
    outcomes: list[Outcome] = []
    with progress_bar(stderr_console(), "case") as progress:
        task = progress.add_task("verifying", total=len(cases))
        for operator, group in groupby(cases, key=lambda case: case.operator):
            own: list[Outcome] = []
            for case in group:
                progress.update(task, description=operator)
                own.append(run_case(case, device, dtype, precision=precision, backward=backward, timed=timed))
                progress.advance(task)
            console.print(table(operator, own))
            outcomes += own
    console.print(summary_text(outcomes))
    if json_file is not None:
        settings = {
            "styleforge": __version__,
            "pytorch": torch.__version__,
            "device": str(device),
            "hardware": hardware,
            "dtype": dtype_name,
            "precision": precision,
            "mode": mode.value,
        }
        try:
            json_file.write_text(json.dumps(as_json(outcomes, settings), indent=2) + "\n")
        except OSError as error:
            raise WorkError(f"cannot write {json_file}: {error.strerror}") from error
    return summary(outcomes).failed


def _threads() -> str:
    import torch

    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
