"""Links that lead nowhere, in HTML pages and Markdown files; nothing is fetched.

A relative link must name a file, and its fragment an anchor in it. Other addresses must be well formed. In
Markdown, a path in backticks that begins with a folder of the repository counts as a link; it may hold * and
?.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

_LINKS = ("href", "src", "poster")


class _Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value or "")
            elif name in _LINKS:
                self.links.append(value or "")


_BUILT = ("build", "dist")  # folders that are there only after a build


def markdown_files(root: Path) -> list[Path]:
    """The Markdown files of a checkout; of an unpacked archive, those outside of hidden and built folders."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
            cwd=root, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        found = [root / name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        inner = [path.relative_to(root) for path in root.rglob("*.md")]
        found = [root / p for p in inner if not p.parts[0].startswith(".") and p.parts[0] not in _BUILT]
    return sorted(path for path in found if path.is_file())


def dead_links(files: Iterable[Path], root: Path) -> list[str]:
    """One line for each link in ``files`` that leads nowhere, or out of ``root``."""
    return [f"{file}: {link}: {reason}" for file in files for link, reason in _dead(file, root.resolve())]


def _dead(file: Path, root: Path) -> Iterator[tuple[str, str]]:
    found, paths = _links_of(file)
    for link in dict.fromkeys(found):
        reason = _reason(link, file.resolve(), root)
        if reason is not None:
            yield link, reason
    for path in dict.fromkeys(paths):
        first = path.split("/")[0]
        if first not in _BUILT and (root / first).is_dir() and not any(root.glob(path.rstrip("/"))):
            yield f"`{path}`", "there is no such file"


def _reason(link: str, file: Path, root: Path) -> str | None:
    """Why a link is dead; None where it is not."""
    try:
        parts = urlsplit(link)
    except ValueError as error:
        return str(error)
    if parts.scheme in ("http", "https"):
        fine = re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) and not re.search(r"\s", link)
        return None if fine else "not a well-formed address"
    if parts.scheme in ("mailto", "data"):
        return None if parts.path else "empty"
    if parts.scheme or parts.netloc:
        return f"links of the kind {parts.scheme or '//'} are not expected"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target != root and root not in target.parents:
        return "leads out of the folder"
    if not target.exists():
        return "there is no such file"
    if parts.fragment and unquote(parts.fragment) not in _anchors_of(target):
        return f"{target.name} has no such anchor"
    return None


@cache
def _anchors_of(file: Path) -> set[str]:
    if file.suffix in (".html", ".htm"):
        return _Page(file.read_text(encoding="utf-8")).anchors
    if file.suffix != ".md":
        return set()
    tokens = _markdown(file)
    anchors: set[str] = set()
    for heading, inline in pairwise(tokens):
        if heading.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or ())
        slug = base = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")  # as GitHub does
        count = 0
        while slug in anchors:
            count += 1
            slug = f"{base}-{count}"
        anchors.add(slug)
    for token in _flat(tokens):
        if token.type in ("html_block", "html_inline"):
            anchors |= _Page(token.content).anchors
    return anchors


@cache
def _links_of(file: Path) -> tuple[list[str], list[str]]:
    """Links, and paths in backticks."""
    if file.suffix != ".md":
        return _Page(file.read_text(encoding="utf-8")).links, []
    found: list[str] = []
    paths: list[str] = []
    for token in _flat(_markdown(file)):
        if token.type in ("link_open", "image"):
            found.append(str(token.attrGet("href") or token.attrGet("src") or ""))
        elif token.type in ("html_block", "html_inline"):
            found += _Page(token.content).links
        elif token.type == "code_inline" and re.fullmatch(r"\.?\w[\w.*?-]*(/[\w.*?-]+)+/?", token.content):
            paths.append(token.content)
    return found, paths


def _markdown(file: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))


def _flat(tokens: Sequence[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _flat(token.children or ())
