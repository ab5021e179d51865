"""What `styleforge stylize INPUT OUTPUT` reads and writes, decided and checked before any work."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from styleforge.cli._errors import UsageError
from styleforge.io import PICTURE_SUFFIXES, VIDEO_INPUT_SUFFIXES, VIDEO_OUTPUT_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One file to read and the file to write from it."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Plan:
    """Everything that a run reads and writes.

    Attributes:
        jobs: in the order of the sources' names.
        video: whether the one job is a video; else all are pictures.
        folder: whether INPUT is a folder.
        skipped: suffixes, with counts, of files in the folder that are not pictures.
    """

    jobs: list[Job]
    video: bool = False
    folder: bool = False
    skipped: Counter[str] = field(default_factory=Counter)


def make_plan(source: Path, target: Path, *, force: bool) -> Plan:
    """Finds the files and refuses whatever cannot work.

    A folder is searched with all its subfolders, whose structure OUTPUT repeats; hidden files and folders are
    left out, and so is OUTPUT itself where it lies inside INPUT.

    Args:
        source: a picture, a video or a folder.
        target: a file or a folder; a name that ends with a slash, or an existing folder, is a folder.
        force: whether existing outputs may be replaced.

    Raises:
        UsageError: something is missing, of an unknown kind, or would be overwritten.
    """
    if not source.exists():
        raise UsageError(f"INPUT does not exist: {source}")
    plan = _plan_folder(source, target) if source.is_dir() else _plan_file(source, target)
    _refuse_overwriting(plan, force=force)
    return plan


def _plan_file(source: Path, target: Path) -> Plan:
    if not source.is_file():
        raise UsageError(f"INPUT is neither a file nor a folder: {source}")
    is_video = source.suffix.lower() in VIDEO_INPUT_SUFFIXES
    if target.is_dir():
        target = target / source.name
    known = VIDEO_OUTPUT_SUFFIXES if is_video else PICTURE_SUFFIXES
    if target.suffix.lower() not in known:
        kind = "video" if is_video else "picture"
        if target.suffix.lower() in PICTURE_SUFFIXES | VIDEO_OUTPUT_SUFFIXES:
            raise UsageError(f"INPUT is a {kind}, so OUTPUT must be one as well, got {target}")
        ending = f"'{target.suffix}'" if target.suffix else "a name without a suffix"
        raise UsageError(
            f"cannot write a {kind} as {ending} ({target}); give OUTPUT one of {' '.join(sorted(known))}"
            + ("" if target.suffix else ", or make that folder first")
        )
    return Plan([Job(source, target)], video=is_video)


def _plan_folder(source: Path, target: Path) -> Plan:
    if target.exists() and not target.is_dir():
        raise UsageError(f"INPUT is a folder, so OUTPUT must be a folder as well, got the file {target}")
    if not target.exists() and target.suffix.lower() in PICTURE_SUFFIXES | VIDEO_OUTPUT_SUFFIXES:
        raise UsageError(f"INPUT is a folder, so OUTPUT must be a folder as well, got {target}")
    if target.exists() and target.samefile(source):
        raise UsageError("INPUT and OUTPUT are the same folder; give another one")
    left_out = target.resolve()
    jobs: list[Job] = []
    skipped: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(source):
        here = Path(folder)
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and (here / name).resolve() != left_out
        )
        for name in sorted(names):
            path = here / name
            if name.startswith("."):
                continue
            if path.suffix.lower() in PICTURE_SUFFIXES:
                jobs.append(Job(path, target / path.relative_to(source)))
            else:
                skipped[path.suffix.lower() or name] += 1
    if not jobs:
        raise UsageError(f"no pictures in {source} (looked for {' '.join(sorted(PICTURE_SUFFIXES))})")
    return Plan(jobs, folder=True, skipped=skipped)


def _refuse_overwriting(plan: Plan, *, force: bool) -> None:
    existing = [job for job in plan.jobs if job.target.exists()]
    for job in existing:
        if job.target.is_dir():
            raise UsageError(f"cannot write {job.target}: a folder has that name")
        if job.target.samefile(job.source):  # also with --force: the original would be lost
            raise UsageError(f"INPUT and OUTPUT are the same file: {job.target}")
    if not existing or force:
        return
    if plan.folder:
        raise UsageError(
            f"{len(existing)} of {len(plan.jobs)} output files exist already, the first is "
            f"{existing[0].target}; give another folder, or --force to overwrite"
        )
    raise UsageError(f"OUTPUT exists already: {existing[0].target} (--force overwrites it)")


def describe_skipped(skipped: Counter[str]) -> str:
    """One line about files that were not touched, such as ``3 other files left out (.txt 2, .mp4 1)``."""
    parts = ", ".join(f"{suffix} {count}" for suffix, count in skipped.most_common(6))
    more = ", ..." if len(skipped) > 6 else ""
    videos = any(suffix in VIDEO_INPUT_SUFFIXES for suffix in skipped)
    hint = "; give each video as INPUT of its own" if videos else ""
    total = skipped.total()
    return f"{total} other file{'s' if total != 1 else ''} left out ({parts}{more}){hint}"
