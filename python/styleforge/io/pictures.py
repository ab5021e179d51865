"""Pictures of every common kind as 8-bit RGB, and back.

EXIF orientation is applied to the pixels; transparency is kept as a separate plane; palettes, greyscale,
16-bit and 32-bit grey, CMYK and LAB become RGB. What belongs to the picture and still holds afterwards (an
RGB colour profile, EXIF data without orientation and thumbnail, the resolution) is carried to the written
file.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from styleforge.io.errors import MediaError
from styleforge.io.files import atomic_path

UInt8Array = npt.NDArray[np.uint8]

# The decoders that a file may select by its content. A closed list, because Pillow's full list holds some
# that start other programs (EPS runs Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")

_PILLOW_FORMAT = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pnm": "PPM",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
    ".tga": "TGA",
}
PICTURE_SUFFIXES = frozenset(_PILLOW_FORMAT)
"""File name suffixes, lower case, that are read and written as pictures."""

_WITH_ALPHA = frozenset({"PNG", "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "GIF"})
_WITH_METADATA = frozenset({"JPEG", "PNG", "WEBP", "TIFF", "AVIF"})
_WITH_DPI = frozenset({"JPEG", "PNG", "TIFF"})
# Full chroma resolution for JPEG: stylised pictures are all saturated edges, where 4:2:0 shows.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 92, "subsampling": 0, "optimize": True},
    "WEBP": {"quality": 90},
    "AVIF": {"quality": 80},
    "TIFF": {"compression": "tiff_adobe_deflate"},
}
_WITH_QUALITY = frozenset({"JPEG", "WEBP", "AVIF"})


@dataclass(frozen=True)
class Picture:
    """One picture in memory.

    Attributes:
        rgb: the pixels, uint8 ``[H, W, 3]``.
        alpha: the opacity, uint8 ``[H, W]``, 255 for opaque; None where the picture has no transparency.
        icc_profile: the RGB colour profile that ``rgb`` is in; None means sRGB.
        exif: EXIF data without orientation and thumbnail.
        dpi: resolution, horizontal and vertical, in dots per inch.
        notes: what the user should know about the conversion, one line each.
    """

    rgb: UInt8Array
    alpha: UInt8Array | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def with_rgb(self, rgb: UInt8Array) -> Picture:
        """The same picture with other pixels of the same size.

        Args:
            rgb: uint8 ``[H, W, 3]``.
        """
        if rgb.shape != self.rgb.shape or rgb.dtype != np.uint8:
            raise ValueError(f"rgb must be uint8 {list(self.rgb.shape)}, got {rgb.dtype} {list(rgb.shape)}")
        return replace(self, rgb=rgb)


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """Those of ``_FORMATS`` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def fit_longer_side(width: int, height: int, longer_side: int | None) -> tuple[int, int]:
    """The size with the same shape whose longer side has ``longer_side`` pixels.

    Args:
        width: in pixels.
        height: in pixels.
        longer_side: in pixels; None leaves the size as it is.

    Returns:
        Width and height in pixels, each at least 1.
    """
    if longer_side is None:
        return width, height
    scale = longer_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def read_picture(path: Path, *, size: int | None = None) -> Picture:
    """Reads a picture, upright, as RGB.

    Args:
        path: the file; its format is found from its content.
        size: pixels of the longer side to resize to (Lanczos, with transparency taken into account); None
            keeps it.

    Returns:
        The picture.

    Raises:
        MediaError: the file is missing, broken, animated, or of an unknown kind.
        MemoryError: the picture does not fit into memory.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels on (large panoramas are welcome here) and raises from 179 on.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Doubtful metadata is Pillow's to warn about, not the user's to read a hundred times.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(path, formats=_readable_formats()) as image:
                return _decode(image, size)
    except (MediaError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        if path.stat().st_size == 0:
            raise MediaError("the file is empty") from error
        raise MediaError(f"not a picture of a known format ({', '.join(_readable_formats())})") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise MediaError(f"the picture has more than {limit} megapixels; make it smaller first") from error
    except OSError as error:
        raise MediaError(error.strerror or str(error) or "cannot be read") from error
    except Exception as error:  # Pillow's decoders raise nearly anything for broken content.
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MediaError(f"broken picture: {detail}") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Reads the size of an upright picture from the file's header alone.

    Args:
        path: the file; its format is found from its content.

    Returns:
        Width and height in pixels.

    Raises:
        MediaError: the header cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_readable_formats()) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if turned else (image.width, image.height)
    except Exception as error:
        raise MediaError(str(error)) from error


def _decode(image: Image.Image, size: int | None) -> Picture:
    frames = getattr(image, "n_frames", 1)
    if (
        frames > 1 and image.format != "MPO"
    ):  # MPO is a camera's JPEG with previews behind the picture itself.
        raise MediaError(
            f"the file holds {frames} pictures (animation or pages); split it or make it a video first"
        )
    notes: list[str] = []
    source_format = image.format
    upright = ImageOps.exif_transpose(image)
    exif = _remaining_exif(upright) if source_format != "TIFF" else None
    dpi = image.info.get("dpi")
    profile = image.info.get("icc_profile")
    colour, profile = _to_rgb(upright, profile, notes)
    target = fit_longer_side(colour.width, colour.height, size)
    if target != colour.size:
        colour = colour.resize(target, Image.Resampling.LANCZOS)
    alpha: UInt8Array | None = None
    if colour.mode == "RGBA":
        alpha = np.array(colour.getchannel("A"), dtype=np.uint8)
        colour = colour.convert("RGB")
    return Picture(
        rgb=np.array(colour, dtype=np.uint8),
        alpha=alpha,
        icc_profile=profile,
        exif=exif,
        dpi=(float(dpi[0]), float(dpi[1])) if isinstance(dpi, tuple) and len(dpi) == 2 else None,
        notes=tuple(notes),
    )


def _to_rgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """Converts to mode RGB or RGBA; returns the colour profile that still describes the result."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_8_bit(image).convert("RGB"), None
    if image.mode == "LAB":
        return _to_srgb(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))), None
    if image.mode == "CMYK":
        if profile:
            try:
                return _to_srgb(image, ImageCms.ImageCmsProfile(io.BytesIO(profile))), None
            except (OSError, ImageCms.PyCMSError):
                notes.append("the CMYK colour profile is unusable: colours are approximate")
        return image.convert("RGB"), None
    is_rgb = image.mode in ("RGB", "RGBA", "P", "PA", "RGBX", "RGBa") and profile is not None
    kept = profile if is_rgb and profile is not None and profile[16:20] == b"RGB " else None
    if image.has_transparency_data:
        return image.convert("RGBA"), kept
    return image.convert("RGB"), kept


def _to_srgb(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert converted is not None  # only the in-place form returns None
    return converted


def _deep_grey_to_8_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit and 32-bit grey to 8 bits, where ``Image.convert`` would clip at 255.

    Integers are taken as 16-bit, the only deep grey that the read formats define for photos; floating point
    is taken as 0..1 if no pixel is above 1, else as 0..255.
    """
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise MediaError("the picture holds NaN or infinite values")
        scaled = values * 255.0 if values.size == 0 or values.max() <= 1.0 else values
    else:
        scaled = values.astype(np.float32) / 257.0
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _remaining_exif(image: Image.Image) -> bytes | None:
    """EXIF data that still holds for a changed picture: no orientation, no thumbnail of the old picture."""
    try:
        exif = image.getexif()
        if not exif:
            return None
        kept = Image.Exif()
        # Built anew from the values: tags that are offsets of sub-directories would point into the old block.
        offsets = {int(directory) for directory in ExifTags.IFD}
        left_out = offsets | {int(ExifTags.Base.Orientation)}
        kept.update({tag: value for tag, value in exif.items() if tag not in left_out})
        for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            entries = exif.get_ifd(directory)
            if entries:
                kept.get_ifd(directory).update(entries)
        return kept.tobytes()
    except Exception:  # malformed EXIF blocks are common in the wild and no reason to lose the picture
        return None


def write_picture(
    path: Path, picture: Picture, *, quality: int | None = None, overwrite: bool = False
) -> list[str]:
    """Writes a picture in the format of the path's suffix; the file appears only when it is complete.

    Args:
        path: where to; missing folders are made.
        picture: what to write.
        quality: 1 (smallest) to 100 (best) for JPEG, WebP and AVIF, without effect elsewhere. None: 92, 90
            and 80.
        overwrite: whether an existing file may be replaced.

    Returns:
        What was lost, one line each: transparency in a format without it is laid over white.

    Raises:
        MediaError: the suffix is unknown, the file exists, or it cannot be written.
    """
    pillow_format = _PILLOW_FORMAT.get(path.suffix.lower())
    if pillow_format is None:
        raise MediaError(f"cannot write '{path.suffix}' (known: {' '.join(sorted(PICTURE_SUFFIXES))})")
    if path.exists() and not overwrite:
        raise MediaError("the output file exists already")
    notes: list[str] = []
    image = Image.fromarray(picture.rgb)
    if picture.alpha is not None:
        alpha = Image.fromarray(picture.alpha)
        if pillow_format in _WITH_ALPHA:
            image.putalpha(alpha)
        else:
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
            notes.append(f"{pillow_format} has no transparency: the picture was laid over white")
    options = dict(_SAVE_OPTIONS.get(pillow_format, {}))
    if quality is not None and pillow_format in _WITH_QUALITY:
        options["quality"] = quality
    if pillow_format in _WITH_METADATA:
        if picture.icc_profile is not None:
            options["icc_profile"] = picture.icc_profile
        if picture.exif is not None:
            options["exif"] = picture.exif
    if pillow_format in _WITH_DPI and picture.dpi is not None:
        options["dpi"] = picture.dpi
    with atomic_path(path, overwrite=overwrite) as temporary:
        try:
            image.save(temporary, format=pillow_format, **options)
        except MemoryError:
            raise
        except OSError as error:
            raise MediaError(f"cannot write: {error.strerror or error}") from error
        except (ValueError, KeyError) as error:  # sizes beyond the format's limit, a codec that Pillow lacks
            raise MediaError(f"cannot write {pillow_format}: {error}") from error
    return notes
