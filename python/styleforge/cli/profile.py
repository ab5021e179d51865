"""`styleforge profile`: which operators a network runs, on which path, and for how long."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from styleforge.cli._errors import UsageError, with_clear_errors
from styleforge.cli.export import picture_size, which_model

if TYPE_CHECKING:
    from rich.table import Table

    from styleforge.bench.profile import Profile

# Outside a terminal there is no width, and rows stay whole.
_WIDTH = 160


@with_clear_errors
def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A style of the package (`styleforge styles`) or a TransformerNet's weights: .pth, .pt, "
            ".model or .safetensors.",
        ),
    ],
    size: Annotated[
        str, typer.Option(metavar="HEIGHTxWIDTH", help="Of the pictures, in pixels.")
    ] = "512x512",
    batch_size: Annotated[int, typer.Option(help="Pictures at once.", metavar="N")] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float16 on a GPU, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run one forward under torch.profiler: styleforge's operators, their paths and times.

    Times are the wall clock's on the CPU, and those of the kernels on a GPU.
    """
    style, checkpoint = which_model(model)
    height, width = picture_size(size)
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")

    # The profiler's own log lines would come in between; it reads this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")

    import torch
    from rich.console import Console

    from styleforge.bench.profile import profile as run
    from styleforge.cli._console import status, stderr_console
    from styleforge.cli._engine import choose_device, choose_dtype
    from styleforge.cli._network import load_network

    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    with status(stderr_console(), "profiling"):
        network = load_network(style, checkpoint, where, precision)
        pictures = torch.full((batch_size, 3, height, width), 127.0, device=where, dtype=precision)
        result = run(lambda: network(pictures), where)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    title = f"{model}, {batch_size}x3x{height}x{width}, {str(precision)[6:]}, {where}"
    console.print(_table(result, title))


def _table(result: Profile, title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_footer=True
    )
    table.add_column("operator", "in all", overflow="fold")
    table.add_column("path", overflow="fold")
    table.add_column("input")
    table.add_column("weight")
    table.add_column("calls", justify="right")
    table.add_column("ms", f"{result.total_ms:.3f}", justify="right")
    table.add_column("share", "100.0%" if result.total_ms else "", justify="right")
    for row in result.rows:
        call = row.call
        table.add_row(
            Text(call.operator),
            Text(call.path),
            _shape(call.input),
            _shape(call.weight),
            str(row.calls),
            f"{row.milliseconds:.3f}",
            _share(row.milliseconds, result.total_ms),
        )
    table.add_row(
        "other operators", "", "", "", "", f"{result.other_ms:.3f}", _share(result.other_ms, result.total_ms)
    )
    return table


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
