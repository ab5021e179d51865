"""The two pipelines of `styleforge stylize`: many pictures, and one video.

Files are read and written on threads beside the network: decoding a JPEG or compressing a PNG takes longer
than a GPU needs for the picture.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from styleforge.cli._engine import NotFiniteError, PictureTooLargeError, Stylizer
from styleforge.cli._errors import WorkError
from styleforge.cli._plan import Job
from styleforge.io import (
    MediaError,
    Picture,
    VideoReader,
    VideoWriter,
    atomic_path,
    read_picture,
    write_picture,
)
from styleforge.io.video import AudioPacket, Frame

T = TypeVar("T")

_AUTO_BATCH_PIXELS = 4_000_000
_AUTO_BATCH_MOST = 8
_READ_AHEAD_FRAMES = 16


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        written: finished files.
        failures: files that could not be done, with the reason.
        notes: what the user should know, one line each.
    """

    written: list[Path] = field(default_factory=list)
    failures: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def batch_size(asked: int | None, height: int, width: int, device_type: str) -> int:
    """How many equally sized pictures go through the network at once.

    Args:
        asked: the user's choice; None picks as many as hold 4 megapixels, at most 8, on a GPU, and 1 on a
            CPU, where one picture keeps all cores busy.
        height: in pixels.
        width: in pixels.
        device_type: ``cuda`` or ``cpu``.
    """
    if asked is not None:
        return asked
    if device_type == "cpu":
        return 1
    return max(1, min(_AUTO_BATCH_MOST, _AUTO_BATCH_PIXELS // (height * width)))


def memory_advice(height: int, width: int, error: PictureTooLargeError, tiled: bool) -> str:
    """One line that says what to do when a picture is too large."""
    smaller = max(256, max(height, width) // 2)
    if tiled:
        return f"out of memory with {width}x{height} pixels; use a smaller --tile ({error})"
    return (
        f"out of memory with {width}x{height} pixels; use --size {smaller} for a smaller picture, or "
        f"--tile 1024 for the full size in tiles, whose colours may differ ({error})"
    )


def stylize_pictures(
    jobs: Sequence[Job],
    stylizer: Stylizer,
    *,
    size: int | None,
    batch: int | None,
    quality: int | None,
    force: bool,
    advance: Callable[[], None],
) -> Outcome:
    """Reads, stylises and writes pictures; one that fails does not stop the others.

    Pictures of one size share a batch. So that sizes may come mixed, they are gathered by size, with a bound
    on how many wait in memory.

    Args:
        jobs: what to read and write.
        stylizer: the network.
        size: pixels of the longer side, or None.
        batch: pictures at once, or None for an automatic choice.
        quality: of lossy formats, 1 to 100, or None.
        force: whether existing files may be replaced.
        advance: called once for each job that is done or has failed.
    """
    outcome = Outcome()
    workers = max(2, min(8, os.cpu_count() or 2))
    depth = max(workers, 2 * (batch or _AUTO_BATCH_MOST if stylizer.device.type == "cuda" else batch or 1))
    waiting: dict[tuple[int, ...], list[tuple[Job, Picture]]] = {}
    writing: deque[tuple[Job, Future[list[str]]]] = deque()

    def fail(job: Job, problem: str) -> None:
        outcome.failures.append((job.source, problem))
        advance()

    def settle(most: int) -> None:
        """Takes note of finished files, and waits while more than ``most`` are under way."""
        while writing and (len(writing) > most or writing[0][1].done()):
            job, future = writing.popleft()
            try:
                outcome.notes.extend(f"{job.target}: {line}" for line in future.result())
                outcome.written.append(job.target)
                advance()
            except MediaError as error:
                fail(job, str(error))
            except MemoryError:
                fail(job, "not enough memory to write the picture")

    def flush(shape: tuple[int, ...]) -> None:
        group = waiting.pop(shape)
        for job, result in _stylize_group(group, stylizer, fail):
            writing.append(
                (job, pool.submit(write_picture, job.target, result, quality=quality, overwrite=force))
            )
        settle(depth)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="styleforge-files")
    try:
        for job, loaded in _read_ahead(pool, jobs, lambda job: read_picture(job.source, size=size), depth):
            try:
                picture = loaded.result()
            except MediaError as error:
                fail(job, str(error))
                continue
            except MemoryError:
                fail(job, "not enough memory to read the picture; make it smaller first")
                continue
            settle(depth)
            outcome.notes.extend(f"{job.source}: {line}" for line in picture.notes)
            shape = picture.rgb.shape
            waiting.setdefault(shape, []).append((job, picture))
            limit = batch_size(batch, shape[0], shape[1], stylizer.device.type)
            if len(waiting[shape]) >= limit:
                flush(shape)
            elif sum(map(len, waiting.values())) >= 4 * limit:
                flush(next(iter(waiting)))
        for shape in list(waiting):
            flush(shape)
        settle(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return outcome


def _stylize_group(
    group: list[tuple[Job, Picture]], stylizer: Stylizer, fail: Callable[[Job, str], None]
) -> Iterator[tuple[Job, Picture]]:
    """Stylises pictures of one size together, or one by one where memory or a NaN demands it.

    Instance norm looks at each picture alone, so the split changes no result.
    """
    try:
        results = stylizer(np.stack([picture.rgb for _, picture in group]))
    except (PictureTooLargeError, NotFiniteError) as error:
        if len(group) > 1:
            for member in group:
                yield from _stylize_group([member], stylizer, fail)
        elif isinstance(error, PictureTooLargeError):
            height, width = group[0][1].rgb.shape[:2]
            fail(group[0][0], memory_advice(height, width, error, stylizer.tile is not None))
        else:
            fail(group[0][0], str(error))
        return
    for (job, picture), result in zip(group, results, strict=True):
        yield job, picture.with_rgb(result)


def _read_ahead(
    pool: ThreadPoolExecutor, jobs: Sequence[Job], read: Callable[[Job], Picture], depth: int
) -> Iterator[tuple[Job, Future[Picture]]]:
    """Yields each job with its finished or failed reading, in order, keeping ``depth`` readings under way."""
    under_way: deque[tuple[Job, Future[Picture]]] = deque()
    for job in jobs:
        under_way.append((job, pool.submit(read, job)))
        if len(under_way) > depth:
            yield under_way.popleft()
    while under_way:
        yield under_way.popleft()


def stylize_video(
    job: Job,
    reader: VideoReader,
    stylizer: Stylizer,
    *,
    batch: int | None,
    quality: int | None,
    force: bool,
    advance: Callable[[int], None],
) -> int:
    """Stylises a video frame by frame and copies its audio.

    Args:
        job: what is read and written.
        reader: the opened source.
        stylizer: the network.
        batch: frames at once, or None for an automatic choice.
        quality: 1 to 100, or None.
        force: whether an existing file may be replaced.
        advance: called with the number of frames that were written.

    Returns:
        The number of frames written.

    Raises:
        WorkError: reading, stylising or writing failed; nothing is left behind.
    """
    try:
        with atomic_path(job.target, overwrite=force) as temporary:
            writer = VideoWriter(temporary, reader, quality=quality)
            try:
                _copy_stylised(reader, writer, stylizer, batch, advance)
                writer.finish()
            except BaseException:
                writer.abort()
                raise
    except MediaError as error:
        raise WorkError(f"{job.source}: {error}") from error
    return writer.frames


def _copy_stylised(
    reader: VideoReader,
    writer: VideoWriter,
    stylizer: Stylizer,
    batch: int | None,
    advance: Callable[[int], None],
) -> None:
    frames: list[Frame] = []

    def flush() -> None:
        if not frames:
            return
        for frame, rgb in zip(frames, _stylize_frames(frames, stylizer), strict=True):
            writer.write(Frame(rgb, frame.pts))
        advance(len(frames))
        frames.clear()

    with _Prefetch(iter(reader), _READ_AHEAD_FRAMES) as items:
        for item in items:
            if isinstance(item, AudioPacket):
                writer.write(item)
                continue
            frames.append(item)
            if len(frames) >= batch_size(batch, item.rgb.shape[0], item.rgb.shape[1], stylizer.device.type):
                flush()
    flush()


def _stylize_frames(
    frames: list[Frame], stylizer: Stylizer
) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    try:
        results = stylizer(np.stack([frame.rgb for frame in frames]))
    except PictureTooLargeError as error:
        height, width = frames[0].rgb.shape[:2]
        if len(frames) == 1:
            raise WorkError(memory_advice(height, width, error, stylizer.tile is not None)) from error
        raise WorkError(
            f"out of memory with {len(frames)} frames of {width}x{height} pixels; use --batch 1"
        ) from error
    except NotFiniteError as error:
        raise WorkError(str(error)) from error
    yield from results


class _Prefetch(Generic[T]):
    """Runs an iterator on a thread of its own, a bounded number of items ahead.

    An exception of the iterator is raised again where the items are taken. Leaving the ``with`` block stops
    the thread.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._source = source
        self._queue: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="styleforge-decoder", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._items()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _put(self, more: bool, item: T | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put((more, item), timeout=0.1)
                return
            except queue.Full:
                continue

    def _fill(self) -> None:
        try:
            for item in self._source:
                self._put(True, item)
                if self._stop.is_set():
                    return
            self._put(False, None)
        except BaseException as error:
            self._put(False, error)

    def _items(self) -> Iterator[T]:
        while True:
            more, item = self._queue.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]  # an exception or None comes only with more=False
