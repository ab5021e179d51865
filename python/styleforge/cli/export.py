"""`styleforge export`: a style network as a file that runs without this package's Python."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from styleforge.cli._errors import UsageError, WorkError, one_line, with_clear_errors

if TYPE_CHECKING:
    from torch import Tensor, nn


class Target(str, Enum):
    """What to export to."""

    torchscript = "torchscript"
    aoti = "aoti"
    onnx = "onnx"


_SUFFIXES = {Target.torchscript: (".pt", ".ts"), Target.aoti: (".pt2",), Target.onnx: (".onnx",)}
_CHECKPOINTS = (".pth", ".pt", ".model", ".safetensors")
# As `styleforge stylize`: below this the inner layers have nothing to reflect.
_SMALLEST = 16


@with_clear_errors
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A style of the package (`styleforge styles`) or a TransformerNet's weights: .pth, .pt, "
            ".model or .safetensors.",
        ),
    ],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="torchscript: a .pt file for LibTorch and Python. aoti: a .pt2 package that AOTInductor has "
            "compiled for this machine. onnx: standard operators for any ONNX runtime.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: MODEL's name, in this folder."),
    ] = None,
    size: Annotated[
        str,
        typer.Option(metavar="HEIGHTxWIDTH", help="Of the example picture; with --fixed the only one."),
    ] = "256x256",
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic/--fixed", help="Any batch, height and width, or one picture of the size of --size."
        ),
    ] = True,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float16 on a GPU, else float32.")
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:N, where the file shall run; auto takes the GPU for aoti if there "
            "is one, and the CPU for files that run anywhere."
        ),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite an existing file.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a style network as TorchScript, as an AOTInductor package or as ONNX.

    The network takes and gives RGB pictures [N, 3, H, W] in 0..255, H and W at least 16.

    TorchScript files and packages need libstyleforge.so in the process that runs them (`import styleforge`,
    or see examples/cpp). ONNX files need nothing of styleforge.
    """
    style, checkpoint = which_model(model)
    sizes = picture_size(size)
    if to is Target.torchscript and not dynamic:
        raise UsageError("--fixed: TorchScript files take any size; leave it out, or use --to aoti or onnx")
    target = _target(to, output, Path(model).stem, checkpoint, force=force)
    if to is Target.onnx:
        from styleforge.onnx._packages import import_exporter

        import_exporter()  # before the seconds that torch and the network take

    import torch

    from styleforge.cli._console import status, stderr_console
    from styleforge.cli._engine import choose_device, choose_dtype
    from styleforge.cli._network import load_network
    from styleforge.io.errors import MediaError
    from styleforge.io.files import atomic_path

    where = choose_device("cpu" if device == "auto" and to is not Target.aoti else device)
    precision = choose_dtype(dtype, where)
    console = stderr_console()
    start = time.perf_counter()
    with status(console, "loading the network"):
        network = load_network(style, checkpoint, where, precision).requires_grad_(False)
    # An example of one picture would fix the batch at one.
    example = torch.full((2 if dynamic else 1, 3, *sizes), 127.0, device=where, dtype=precision)
    write = {Target.torchscript: _torchscript, Target.aoti: _aoti, Target.onnx: _onnx}[to]
    try:
        with (
            status(console, f"exporting to {to.value}"),
            atomic_path(target, overwrite=force) as path,
            _quiet(),
            torch.no_grad(),
        ):
            write(network, example, path, dynamic)
            megabytes = path.stat().st_size / 1e6
    except MediaError as error:
        raise WorkError(f"{target}: {error}") from error
    except Exception as error:  # whatever the exporters, the compiler or the file system raise
        raise WorkError(f"cannot export to {to.value}: {one_line(error)}") from error
    shape = "any batch, height and width" if dynamic else f"1x3x{sizes[0]}x{sizes[1]}"
    typer.echo(
        f"wrote {target}: {megabytes:.1f} MB, {shape}, {where}, {str(precision)[6:]} "
        f"({time.perf_counter() - start:.1f} s)"
    )


def which_model(model: str) -> tuple[str | None, Path | None]:
    """The style's name or the checkpoint's path, of which one is None.

    Raises:
        UsageError: it looks like a file, and there is none.
    """
    path = Path(model)
    if path.is_file():
        return None, path
    if path.suffix.lower() in _CHECKPOINTS or len(path.parts) > 1:
        raise UsageError(f"no such file: {model}")
    return model, None


def picture_size(text: str) -> tuple[int, int]:
    """Height and width in pixels from ``480x640``, or from ``512`` for both.

    Raises:
        UsageError: it is something else, or too small for a style network.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UsageError(f"--size must be HEIGHTxWIDTH in pixels, such as 480x640, got '{text}'")
    height, width = int(match.group(1)), int(match.group(2) or match.group(1))
    if min(height, width) < _SMALLEST:
        raise UsageError(f"--size must be at least {_SMALLEST}x{_SMALLEST}, got '{text}'")
    return height, width


def _target(to: Target, output: Path | None, stem: str, checkpoint: Path | None, *, force: bool) -> Path:
    suffixes = _SUFFIXES[to]
    target = Path(stem + suffixes[0]) if output is None else output
    if target.suffix.lower() not in suffixes:
        raise UsageError(f"--output must end in {' or '.join(suffixes)} for --to {to.value}, got {target}")
    if target.is_dir():
        raise UsageError(f"--output is a folder: {target}")
    if target.exists():
        if checkpoint is not None and target.samefile(checkpoint):  # also with --force: it would be lost
            raise UsageError(f"the output would overwrite MODEL itself: {target}; give --output FILE")
        if not force:
            raise UsageError(f"the output exists already: {target} (--force overwrites it)")
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' warnings and log lines are about their own workings."""
    import logging
    import warnings

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _torchscript(network: nn.Module, example: Tensor, path: Path, dynamic: bool) -> None:
    import torch

    torch.jit.script(network).save(str(path))


def _aoti(network: nn.Module, example: Tensor, path: Path, dynamic: bool) -> None:
    import torch
    from torch.export import Dim

    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if dynamic else None
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _onnx(network: nn.Module, example: Tensor, path: Path, dynamic: bool) -> None:
    import styleforge.onnx

    shapes = ({0: "batch", 2: "height", 3: "width"},) if dynamic else None
    styleforge.onnx.export(
        network, (example,), path, dynamic_shapes=shapes, input_names=["picture"], output_names=["stylised"]
    )
