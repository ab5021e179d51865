"""`styleforge stylize`: pictures, folders of pictures and videos in the style of a trained network."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from styleforge.cli._errors import FAILURE, UsageError, WorkError, with_clear_errors

if TYPE_CHECKING:
    from rich.console import Console

    from styleforge.cli._engine import Stylizer
    from styleforge.cli._plan import Plan

_SMALLEST_TILE = 64


@with_clear_errors
def stylize(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A picture, a video, or a folder of pictures (with its subfolders)."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            help="A file, whose suffix selects the format, or a folder, in which the names stay the same.",
        ),
    ],
    style: Annotated[
        str | None,
        typer.Option("--style", "-s", help="A style of the package; `styleforge styles` lists them."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", "-c", help="A TransformerNet's weights: .pth, .pt, .model or .safetensors."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            min=1,
            metavar="PIXELS",
            help="Resize so that the longer side has this many pixels first.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes the GPU if there is one.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float16 on a GPU, else float32.")
    ] = "auto",
    compile_network: Annotated[
        bool,
        typer.Option("--compile", help="torch.compile the network: slow start, pays off for many pictures."),
    ] = False,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Pictures or frames of one size at once. Default: 4 megapixels' worth, at most 8, on a GPU, "
            "else 1.",
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=_SMALLEST_TILE,
            metavar="PIXELS",
            help="Work in overlapping tiles of this side where memory is short. Each tile is normalised "
            "alone, so the colours differ from those of the whole picture.",
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            metavar="1-100",
            help="Of JPEG (default 92), WebP (90), AVIF (80) and video (about 77); lossless formats "
            "ignore it.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite existing output files.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Paint INPUT in a style and write it to OUTPUT.

    A file of a folder that cannot be read does not stop the others: it is listed at the end, and the exit
    code is 1. Wrong usage ends with exit code 2 before any work. Files appear under their name only when they
    are complete.
    """
    from styleforge.cli._console import note, status, stderr_console
    from styleforge.cli._memory import limited_to_available_memory
    from styleforge.cli._network import load_network
    from styleforge.cli._plan import describe_skipped, make_plan

    if (style is None) == (checkpoint is None):
        raise UsageError(
            "give either --style NAME or --checkpoint FILE (`styleforge styles` lists the styles)"
        )
    if checkpoint is not None and not checkpoint.is_file():
        raise UsageError(f"--checkpoint: no such file: {checkpoint}")
    if tile is not None and tile % 4:
        raise UsageError(f"--tile must be a multiple of 4, got {tile}")
    plan = make_plan(source, target, force=force)
    if plan.video:
        from styleforge.io.video import import_av

        import_av()  # before the seconds that torch and the network take
    console = stderr_console()
    if plan.skipped:
        note(console, describe_skipped(plan.skipped))

    from styleforge.cli._engine import Stylizer, choose_device, choose_dtype

    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    with status(console, "loading the network"):
        network = load_network(style, checkpoint, where, precision)
    if compile_network:
        import torch

        network = torch.compile(network)  # type: ignore[assignment]  # still a Module
    stylizer = Stylizer(network, device=where, dtype=precision, tile=tile)
    run = _run_video if plan.video else _run_pictures
    with limited_to_available_memory() if where.type == "cpu" else contextlib.nullcontext():
        run(plan, stylizer, console, size=size, batch=batch, quality=quality, force=force)


def _run_pictures(
    plan: Plan,
    stylizer: Stylizer,
    console: Console,
    *,
    size: int | None,
    batch: int | None,
    quality: int | None,
    force: bool,
) -> None:
    from styleforge.cli._console import format_rate, note, print_failures, progress_bar
    from styleforge.cli._run import stylize_pictures

    start = time.perf_counter()
    with progress_bar(console, "picture") as progress:
        bar = progress.add_task("stylising", total=len(plan.jobs))
        outcome = stylize_pictures(
            plan.jobs,
            stylizer,
            size=size,
            batch=batch,
            quality=quality,
            force=force,
            advance=lambda: progress.advance(bar),
        )
    seconds = time.perf_counter() - start
    for line in outcome.notes:
        note(console, line)
    if not plan.folder and outcome.failures:
        path, problem = outcome.failures[0]
        raise WorkError(f"{path}: {problem}")
    how = f"{stylizer.device}, {str(stylizer.dtype)[6:]}"
    if plan.folder:
        rate = format_rate(len(outcome.written) / seconds)
        typer.echo(
            f"wrote {len(outcome.written)} of {len(plan.jobs)} pictures in {seconds:.1f} s "
            f"({rate} pictures/s, {how})"
        )
    else:
        typer.echo(f"wrote {outcome.written[0]} in {seconds:.2f} s ({how})")
    if outcome.failures:
        print_failures(console, outcome.failures)
        raise typer.Exit(FAILURE)


def _run_video(
    plan: Plan,
    stylizer: Stylizer,
    console: Console,
    *,
    size: int | None,
    batch: int | None,
    quality: int | None,
    force: bool,
) -> None:
    from styleforge.cli._console import format_rate, note, progress_bar
    from styleforge.cli._run import stylize_video
    from styleforge.io import MediaError, VideoReader

    job = plan.jobs[0]
    start = time.perf_counter()
    try:
        reader = VideoReader(job.source, size=size)
    except MediaError as error:
        raise WorkError(f"{job.source}: {error}") from error
    with reader, progress_bar(console, "frame") as progress:
        bar = progress.add_task("stylising", total=reader.frames)
        frames = stylize_video(
            job,
            reader,
            stylizer,
            batch=batch,
            quality=quality,
            force=force,
            advance=lambda count: progress.advance(bar, count),
        )
    seconds = time.perf_counter() - start
    for line in reader.notes:
        note(console, line)
    how = f"{stylizer.device}, {str(stylizer.dtype)[6:]}"
    typer.echo(
        f"wrote {job.target}: {frames} frames in {seconds:.1f} s "
        f"({format_rate(frames / seconds)} frames/s, {how})"
    )
    if reader.damaged:
        raise WorkError(f"{job.source}: {reader.damaged} damaged parts of the video were left out")
