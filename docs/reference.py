"""Renders the reference of what is public, from the docstrings of the installed package: `make docs`.

    python docs/reference.py build/docs

One page a module (pdoc), a search box, nothing loaded from elsewhere. Ends with exit code 1 where pdoc warns
(of a type that it cannot read, say) or a link leads nowhere.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import warnings
from pathlib import Path

import links
import pdoc
import pdoc.render

import styleforge

# One page each. Its names are those of its __all__; a package in it comes only by its own line here.
MODULES = (
    "styleforge",
    "styleforge.ops",
    "styleforge.nn",
    "styleforge.models",
    "styleforge.fuse",
    "styleforge.jit",
    "styleforge.onnx",
    "styleforge.build",
    "styleforge.io",
)
ROOT = Path(__file__).resolve().parents[1]


def render(folder: Path) -> None:
    """Writes the pages; what was in the folder goes.

    Raises:
        Warning: pdoc could not read something as it was meant.
    """
    if folder.exists():
        if not (folder / "search.js").is_file() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds something else than the reference")
        shutil.rmtree(folder)
    pdoc.render.configure(
        docformat="google",
        include_undocumented=False,
        footer_text=f"styleforge {styleforge.__version__}",
        show_source=False,
        template_directory=Path(__file__).parent / "templates",
    )
    styleforge.cmake_prefix_path = "where styleforge is installed"  # not where this machine has it
    others = [f"!{name}\\." for name in MODULES if name != "styleforge"]
    # `styleforge` lists some of the packages below it: they come once, by their own names.
    top = ["styleforge", r"!styleforge\."]
    for name in MODULES:  # what others warn of when they are imported is not ours
        importlib.import_module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*top, *MODULES[1:], *others, output_directory=folder)


def main(output: str) -> int:
    """Renders, then follows the links in the pages and in the repository's Markdown files."""
    folder = Path(output)
    render(folder)
    pages = sorted(folder.rglob("*.html"))
    dead = links.dead_links(pages, folder) + links.dead_links(links.markdown_files(ROOT), ROOT)
    for line in dead:
        print(line, file=sys.stderr)
    print(f"{len(pages)} pages in {folder.resolve()}, dead links: {len(dead)}")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
