"""`styleforge styles`: the styles that come with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from styleforge.cli._errors import with_clear_errors


@with_clear_errors
def styles(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List the styles for `styleforge stylize --style NAME`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from styleforge.models import available_styles

    found = available_styles()
    if not found:
        typer.echo("no styles are installed; use `styleforge stylize --checkpoint FILE`")
        return
    table = Table()
    table.add_column("style", no_wrap=True)
    table.add_column("description", overflow="fold")
    for style in found:
        table.add_row(Text(style.name), Text(style.description))
    Console().print(table)
