"""Videos as batches of 8-bit RGB frames, and back, through PyAV (the optional extra ``styleforge[video]``).

The written video keeps every frame's time stamp (so also a variable frame rate), the pixel aspect ratio and
the audio streams, copied bit for bit. A rotation flag is applied to the pixels. Colours are converted with
the matrix that the source names and written as tagged BT.709, limited range.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from styleforge.io.errors import MediaError, MissingPackageError
from styleforge.io.pictures import fit_longer_side

UInt8Array = npt.NDArray[np.uint8]

_ENCODERS = {
    ".mp4": "libx264",
    ".m4v": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
}
VIDEO_OUTPUT_SUFFIXES = frozenset(_ENCODERS)
"""File name suffixes, lower case, that videos are written to."""
VIDEO_INPUT_SUFFIXES = VIDEO_OUTPUT_SUFFIXES | {
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".wmv",
    ".flv",
    ".3gp",
    ".ogv",
}
"""File name suffixes, lower case, that are read as videos."""

# ITU-T H.273 code points, as FFmpeg's AVCOL_* use them.
_BT709, _UNSPECIFIED, _BT601_CODES, _BT2020_CODES = 1, 2, (4, 5, 6), (9, 10)
_LIMITED_RANGE = 1
_HDR_TRANSFER = (16, 18)  # SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG)
# The matrices of libswscale's sws_getCoefficients.
_SWS_BT709, _SWS_BT601, _SWS_BT2020 = 1, 5, 9


def import_av() -> ModuleType:
    """PyAV.

    Raises:
        MissingPackageError: it is not installed, or older than 14.
    """
    try:
        import av
    except ImportError as error:
        raise MissingPackageError(
            "reading and writing video needs PyAV: pip install 'styleforge[video]' (or: pip install av)"
        ) from error
    if int(av.__version__.split(".")[0]) < 14:
        raise MissingPackageError(f"video needs PyAV 14 or newer, found {av.__version__}: pip install -U av")
    return av


@dataclass(frozen=True)
class Frame:
    """One video frame.

    Attributes:
        rgb: upright pixels, uint8 ``[H, W, 3]``.
        pts: presentation time in units of the reader's ``time_base``.
    """

    rgb: UInt8Array
    pts: int


@dataclass(frozen=True)
class AudioPacket:
    """One compressed audio packet, to be copied.

    Attributes:
        stream: which of the reader's ``audio_streams`` it belongs to.
        packet: the ``av.Packet``.
    """

    stream: int
    packet: Any


class VideoReader:
    """A video file's upright RGB frames and its compressed audio, in the file's order.

    Args:
        path: the file.
        size: pixels of the longer side to resize to; None keeps the size. Width and height are made even,
            which the usual chroma subsampling demands.

    Attributes:
        frames: the number of frames, or None where the file does not tell; an estimate in some formats.
        rate: average frames per second.
        time_base: seconds per unit of a frame's ``pts``.
        pixel_aspect: width over height of one pixel of the upright picture.
        audio_streams: the ``av`` streams to copy.
        damaged: packets that could not be decoded so far.
        notes: what the user should know, one line each.

    Raises:
        MediaError: the file is missing, broken, or has no video.
        MissingPackageError: PyAV is not installed.
    """

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        self._av = import_av()
        self._size = size
        self.damaged = 0
        self.notes: list[str] = []
        try:
            self._container = self._av.open(str(path))
        except (self._av.FFmpegError, OSError) as error:
            raise MediaError(_reason(error)) from error
        if not self._container.streams.video:
            self._container.close()
            raise MediaError("the file has no video stream")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        self._stream = stream
        self.audio_streams: list[Any] = list(self._container.streams.audio)
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.time_base = Fraction(stream.time_base or 1 / self.rate)
        self.pixel_aspect = Fraction(stream.sample_aspect_ratio or 1)
        self._seconds: float | None = None
        if stream.duration is not None:
            self._seconds = float(stream.duration * self.time_base)
        elif self._container.duration is not None:
            self._seconds = self._container.duration / self._av.time_base
        self.frames: int | None = stream.frames or None
        if self.frames is None and self._seconds is not None:
            self.frames = max(1, round(self._seconds * float(self.rate)))
        self._target: tuple[int, int] | None = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._container.close()

    def __iter__(self) -> Iterator[Frame | AudioPacket]:
        """Decodes the file from its start, once.

        Raises:
            MediaError: no frame at all could be decoded.
        """
        audio = {stream.index: number for number, stream in enumerate(self.audio_streams)}
        last_pts: int | None = None
        frame_duration = max(1, round(1 / (self.rate * self.time_base)))
        packets = self._container.demux(self._stream, *self.audio_streams)
        while True:
            try:
                packet = next(packets, None)
            except self._av.FFmpegError:
                self.damaged += 1  # the container ends early: what came before is good
                packet = None
            if packet is None:
                break
            if packet.stream.index in audio:
                if packet.dts is not None:  # the empty packet that ends a stream has none
                    yield AudioPacket(audio[packet.stream.index], packet)
                continue
            try:
                decoded = packet.decode()
            except self._av.FFmpegError:
                self.damaged += 1
                continue
            for frame in decoded:
                pts = frame.pts
                if pts is None or (
                    last_pts is not None and pts <= last_pts
                ):  # encoders need rising time stamps
                    pts = 0 if last_pts is None else last_pts + (frame_duration if frame.pts is None else 1)
                last_pts = pts
                yield Frame(self._upright_rgb(frame), pts)
        if last_pts is None:
            raise MediaError("no frame of the video could be decoded")
        end = float((last_pts + frame_duration - (self._stream.start_time or 0)) * self.time_base)
        if self._seconds is not None and self._seconds - end > max(0.5, 0.1 * self._seconds):
            self.notes.append(
                f"the video ends after {end:.1f} s but the file says {self._seconds:.1f} s: is it cut short?"
            )

    def _upright_rgb(self, frame: Any) -> UInt8Array:
        quarter_turns = round(frame.rotation / 90) % 4
        if self._target is None:
            self._target = self._choose_size(frame, turned=quarter_turns % 2 == 1)
            if quarter_turns % 2:
                self.pixel_aspect = 1 / self.pixel_aspect
            if frame.color_trc in _HDR_TRANSFER:
                self.notes.append(
                    "the video is HDR: it is written as standard dynamic range without tone mapping"
                )
        width, height = self._target
        if frame.colorspace in _BT2020_CODES:
            matrix = _SWS_BT2020
        elif frame.colorspace in _BT601_CODES:
            matrix = _SWS_BT601
        elif frame.colorspace == _UNSPECIFIED and min(frame.width, frame.height) < 720:
            matrix = _SWS_BT601  # what players assume for untagged standard definition
        else:
            matrix = _SWS_BT709
        converted = frame.reformat(
            width=width, height=height, format="rgb24", src_colorspace=matrix, interpolation="LANCZOS"
        )
        # The display matrix and numpy's rot90 both turn counter-clockwise.
        return np.ascontiguousarray(np.rot90(converted.to_ndarray(), quarter_turns))

    def _choose_size(self, frame: Any, *, turned: bool) -> tuple[int, int]:
        """Width and height, before any rotation, to convert the frames to."""
        width, height = fit_longer_side(frame.width, frame.height, self._size)
        even = max(2, width - width % 2), max(2, height - height % 2)
        if even != (width, height):
            shown = f"{even[1]}x{even[0]}" if turned else f"{even[0]}x{even[1]}"
            self.notes.append(f"the frames have {shown} pixels: video needs an even width and height")
        return even


class VideoWriter:
    """Writes RGB frames and copied audio to one file.

    Args:
        path: where to; the suffix selects container and encoder (H.264, or VP9 for ``.webm``).
        source: the reader whose rate, time base, pixel aspect, audio and metadata are taken over.
        quality: 1 (smallest) to 100 (best), mapped linearly to the encoder's constant rate factor 51 to 8;
            None takes 18 for H.264 and 28 for VP9, close to what the eye can tell apart.

    Raises:
        MediaError: the file cannot be made, the encoder is not in this PyAV, or an audio stream does not fit
            in.
    """

    def __init__(self, path: Path, source: VideoReader, *, quality: int | None = None) -> None:
        self._av = import_av()
        suffix = path.suffix.lower()
        encoder = _ENCODERS.get(suffix)
        if encoder is None:
            raise MediaError(f"cannot write video as '{path.suffix}' (known: {' '.join(sorted(_ENCODERS))})")
        if encoder not in self._av.codecs_available:
            raise MediaError(f"this PyAV was built without the encoder {encoder}: pip install -U av")
        self._source = source
        self._pending: list[AudioPacket] = []
        self._started = False
        self.frames = 0
        default = 18 if encoder == "libx264" else 28
        options = {"crf": str(default if quality is None else round(51 - 43 * (quality - 1) / 99))}
        if encoder == "libvpx-vp9":
            options |= {"b": "0", "row-mt": "1", "deadline": "good", "cpu-used": "4"}
        try:
            # The index in front lets players and browsers start before the whole file is there.
            muxer = {"movflags": "faststart"} if suffix in (".mp4", ".m4v", ".mov") else {}
            self._container = self._av.open(str(path), "w", options=muxer)
            self._container.metadata.update(source._container.metadata)
            self._video = self._container.add_stream(encoder, rate=source.rate, options=options)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(f"cannot write: {_reason(error)}") from error
        self._audio = []
        for stream in source.audio_streams:
            try:
                self._audio.append(self._container.add_stream_from_template(stream))
            except (self._av.FFmpegError, ValueError) as error:
                name = stream.codec_context.name
                raise MediaError(
                    f"{name} audio cannot be copied into {suffix}; write to .mkv instead"
                ) from error

    def write(self, item: Frame | AudioPacket) -> None:
        """Encodes a frame or copies an audio packet.

        Args:
            item: the next frame, or a packet of the source's audio.

        Raises:
            MediaError: encoding or writing failed.
        """
        try:
            if isinstance(item, AudioPacket):
                # The header can be written only once a frame has told the size.
                if self._started:
                    self._mux_audio(item)
                else:
                    self._pending.append(item)
                return
            if not self._started:
                self._start(item.rgb.shape[1], item.rgb.shape[0])
            frame = self._av.VideoFrame.from_ndarray(item.rgb, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=_SWS_BT709,
                dst_color_range=_LIMITED_RANGE,
                interpolation="BICUBIC",
            )
            frame.pts = item.pts
            frame.time_base = self._source.time_base
            self._container.mux(self._video.encode(frame))
            self.frames += 1
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(self._explain(error)) from error

    def _start(self, width: int, height: int) -> None:
        context = self._video.codec_context
        self._video.width, self._video.height, self._video.pix_fmt = width, height, "yuv420p"
        context.time_base = self._source.time_base
        context.sample_aspect_ratio = self._source.pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._started = True
        for packet in self._pending:
            self._mux_audio(packet)
        self._pending.clear()

    def _mux_audio(self, item: AudioPacket) -> None:
        item.packet.stream = self._audio[item.stream]
        self._container.mux(item.packet)

    def _explain(self, error: Exception) -> str:
        if self.frames == 0 and self._audio:
            names = ", ".join(stream.codec_context.name for stream in self._source.audio_streams)
            return f"cannot write: {_reason(error)} (does the format hold {names} audio? .mkv holds any)"
        return f"cannot write: {_reason(error)}"

    def finish(self) -> None:
        """Encodes what the encoder holds back and closes the file.

        Raises:
            MediaError: the last part could not be written.
        """
        try:
            self._container.mux(self._video.encode(None))
            self._container.close()
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise MediaError(self._explain(error)) from error

    def abort(self) -> None:
        """Closes the file without caring for its content."""
        # The failure that led here is what the user gets to see.
        with contextlib.suppress(self._av.FFmpegError, OSError, ValueError):
            self._container.close()


def _reason(error: Exception) -> str:
    """FFmpeg's or the system's words for what went wrong, without the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]
