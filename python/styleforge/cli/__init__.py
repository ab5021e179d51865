"""The ``styleforge`` command.

Each command's module is light to import: torch, Pillow and PyAV are imported when a command runs, so that
``--help`` and usage errors answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from styleforge.cli import bench, export, info, profile, styles, stylize, verify

app = typer.Typer(
    name="styleforge",
    help="Real-time style transfer and fused transformer operators for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from styleforge._version import __version__

        typer.echo(f"styleforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Real-time style transfer and fused transformer operators for PyTorch."""


app.command("stylize")(stylize.stylize)
app.command("export")(export.export)
app.command("styles")(styles.styles)
app.command("verify")(verify.verify)
app.command("profile")(profile.profile)
app.command("bench")(bench.bench)
app.command("info")(info.info)


def main() -> None:
    """Entry point of the ``styleforge`` script and of ``python -m styleforge``."""
    app()


__all__ = ["app", "main"]
