"""`styleforge stylize` end to end, with tiny networks whose result is known exactly."""

from __future__ import annotations

import io
import itertools
import struct
import sys
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from styleforge.cli import _memory, _run, app
from styleforge.cli._engine import (
    NotFiniteError,
    PictureTooLargeError,
    Stylizer,
    choose_device,
    choose_dtype,
    is_out_of_memory,
    tile_starts,
    tile_windows,
)
from styleforge.cli._errors import UsageError
from styleforge.cli._memory import available_memory, limited_to_available_memory
from styleforge.io import (
    MediaError,
    Picture,
    atomic_path,
    fit_longer_side,
    picture_size,
    read_picture,
    write_picture,
)


class Identity(nn.Module):
    """Gives the picture back; accepts only what a TransformerNet accepts, and returns its output size."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4 and x.shape[1] == 3
        assert x.shape[2] >= 5 and x.shape[3] >= 5
        self.shapes.append(tuple(x.shape))
        up = (-x.shape[3] % 4, -x.shape[2] % 4)
        return nn.functional.pad(x, (0, up[0], 0, up[1]))


class Invert(Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 255 - super().forward(x)


class OutOfMemoryAbove(Identity):
    """Runs out of memory where batch x height x width is above a limit."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[2] * x.shape[3] > self.pixels:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has")
        return super().forward(x)


class NotANumber(Identity):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float("nan")


@dataclass
class Models:
    """Stands for ``styleforge.models``."""

    styles: dict[str, nn.Module] = field(default_factory=dict)
    checkpoint: Callable[[Path], nn.Module] | None = None
    loaded: list[tuple[str, Any, Any]] = field(default_factory=list)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    state = Models({"same": Identity(), "invert": Invert()})

    def load_style(name: str, device: Any = None, dtype: Any = None) -> nn.Module:
        state.loaded.append((name, device, dtype))
        return state.styles[name]

    def load_checkpoint(path: Path, map_location: str = "cpu") -> nn.Module:
        if state.checkpoint is None:
            raise ValueError(f"{path}: not a checkpoint\nmore")
        return state.checkpoint(path)

    module = types.ModuleType("styleforge.models")
    module.load_style = load_style
    module.load_checkpoint = load_checkpoint
    module.available_styles = lambda: [types.SimpleNamespace(name=n, description=n) for n in state.styles]
    monkeypatch.setitem(sys.modules, "styleforge.models", module)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("STYLEFORGE_DEBUG", raising=False)
    return state


def stylize(*arguments: object, style: str | None = "same") -> Result:
    words = ["stylize", *map(str, arguments), "--device", "cpu"]
    return CliRunner().invoke(app, words + (["--style", style] if style else []))


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- one picture ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 48), (61, 47), (62, 50), (5, 63), (1, 1), (3, 2), (17, 16)])
def test_the_result_has_exactly_the_pictures_size(
    tmp_path: Path, models: Models, size: tuple[int, int]
) -> None:
    pixels = noise(*size)
    result = stylize(save(tmp_path / "in.png", pixels), tmp_path / "out.png", style="invert")
    assert result.exit_code == 0, result.output
    assert "out.png" in result.stdout
    np.testing.assert_array_equal(load(tmp_path / "out.png"), 255 - pixels)


def test_the_style_is_loaded_for_the_device_and_dtype(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "in.png", noise(16, 16))
    assert stylize(source, tmp_path / "out.png", "--dtype", "bfloat16").exit_code == 0
    assert models.loaded == [("same", torch.device("cpu"), torch.bfloat16)]


def test_checkpoint(tmp_path: Path, models: Models) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    models.checkpoint = lambda path: Invert() if path == weights else Identity()
    pixels = noise(20, 24)
    source = save(tmp_path / "in.png", pixels)
    result = stylize(source, tmp_path / "out.png", "--checkpoint", weights, style=None)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(load(tmp_path / "out.png"), 255 - pixels)


def test_broken_checkpoint_is_one_line(tmp_path: Path, models: Models) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    source = save(tmp_path / "in.png", noise(8, 8))
    result = stylize(source, tmp_path / "out.png", "-c", weights, style=None)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot load the checkpoint")
    assert "not a checkpoint" in result.stderr and "more" not in result.stderr
    assert files_in(tmp_path) == ["in.png", "weights.pth"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, models: Models, orientation: int) -> None:
    upright = noise(12, 20)
    # What a camera stores so that the viewer's transposition gives the upright picture (EXIF 2.32, 4.6.4).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:01 10:00:00"
    source = save(tmp_path / "in.png", np.ascontiguousarray(stored), exif=exif)
    assert picture_size(source) == (20, 12)
    assert stylize(source, tmp_path / "out.png").exit_code == 0
    np.testing.assert_array_equal(load(tmp_path / "out.png"), upright)
    with Image.open(tmp_path / "out.png") as image:
        written = image.getexif()
        assert ExifTags.Base.Orientation not in written
        assert written[ExifTags.Base.Make] == "Camera"
        assert written.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2024:05:01 10:00:00"


def test_the_thumbnail_of_the_old_picture_is_dropped(tmp_path: Path, models: Models) -> None:
    thumbnail = io.BytesIO()
    Image.fromarray(noise(16, 16)).save(thumbnail, "JPEG")
    data = thumbnail.getvalue()
    # IFD0 with one entry (Make), then IFD1 with the thumbnail's offset and length; big-endian TIFF.
    header = b"MM\0*" + struct.pack(">I", 8)
    first = struct.pack(">H", 1) + struct.pack(">HHI4s", 0x010F, 2, 4, b"Cam\0") + struct.pack(">I", 26)
    second = (
        struct.pack(">H", 2)
        + struct.pack(">HHII", 0x0201, 4, 1, 56)
        + struct.pack(">HHII", 0x0202, 4, 1, len(data))
    )
    exif = b"Exif\0\0" + header + first + second + struct.pack(">I", 0) + data
    source = save(tmp_path / "in.jpg", noise(32, 32), exif=exif)
    assert data in source.read_bytes()
    assert stylize(source, tmp_path / "out.jpg").exit_code == 0
    written = (tmp_path / "out.jpg").read_bytes()
    assert data not in written
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.getexif()[0x010F] == "Cam"
        assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)


def test_alpha_is_kept(tmp_path: Path, models: Models) -> None:
    pixels = noise(30, 22, 4)
    source = save(tmp_path / "in.png", pixels)
    assert stylize(source, tmp_path / "out.png", style="invert").exit_code == 0
    result = load(tmp_path / "out.png")
    np.testing.assert_array_equal(result[..., 3], pixels[..., 3])
    np.testing.assert_array_equal(result[..., :3], 255 - pixels[..., :3])


def test_alpha_is_resized_with_the_picture(tmp_path: Path, models: Models) -> None:
    pixels = np.full((40, 80, 4), 200, np.uint8)
    pixels[:, :40, 3] = 0
    assert stylize(save(tmp_path / "in.png", pixels), tmp_path / "out.png", "--size", 40).exit_code == 0
    result = load(tmp_path / "out.png")
    assert result.shape == (20, 40, 4)
    assert (result[:, :16, 3] == 0).all() and (result[:, 24:, 3] == 255 - 55).all()
    assert (np.abs(result[:, 24:, :3].astype(int) - 200) <= 1).all()


def test_alpha_over_white_where_the_format_has_none(tmp_path: Path, models: Models) -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    result = stylize(save(tmp_path / "in.png", pixels), tmp_path / "out.bmp")
    assert result.exit_code == 0
    assert "laid over white" in result.stderr
    assert (load(tmp_path / "out.bmp") == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, models: Models, mode: str) -> None:
    image = Image.fromarray(np.repeat(np.repeat(noise(4, 5), 8, 0), 8, 1)).convert(mode)
    path = tmp_path / ("in.tif" if mode in ("CMYK", "YCbCr") else "in.png")
    image.save(path)
    expected = np.array(image.convert("RGBA" if "A" in mode else "RGB"))
    assert stylize(path, tmp_path / "out.png").exit_code == 0
    result = load(tmp_path / "out.png")
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected.astype(int)).max() <= 3


def test_lab_becomes_rgb(tmp_path: Path, models: Models) -> None:
    rgb = Image.fromarray(np.repeat(np.repeat(noise(4, 5), 8, 0), 8, 1))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB")
    assert image is not None
    image.save(tmp_path / "in.tif")
    assert stylize(tmp_path / "in.tif", tmp_path / "out.png").exit_code == 0
    difference = np.abs(load(tmp_path / "out.png").astype(int) - np.array(rgb))
    assert difference.mean() < 2  # 8-bit LAB is coarse: single colours are up to 13 off


def test_palette_with_transparency(tmp_path: Path, models: Models) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (8, 0, 16, 16))
    image.save(tmp_path / "in.png", transparency=0)
    assert stylize(tmp_path / "in.png", tmp_path / "out.png").exit_code == 0
    result = load(tmp_path / "out.png")
    assert tuple(result[0, 0]) == (10, 20, 30, 0)
    assert tuple(result[0, 15]) == (200, 100, 50, 255)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, models: Models, suffix: str) -> None:
    deep = (np.arange(400, dtype=np.uint32) * 65535 // 399).astype(np.uint16).reshape(20, 20)
    path = save(tmp_path / f"in.{suffix}", deep)
    assert stylize(path, tmp_path / "out.png").exit_code == 0
    expected = np.rint(deep / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(load(tmp_path / "out.png"), np.stack([expected] * 3, -1))


def test_16_bit_rgb(tmp_path: Path, models: Models) -> None:
    deep = (noise(9, 11).astype(">u2")) * 257
    rows = b"".join(b"\0" + row.tobytes() for row in deep)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 11, 9, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "in.png").write_bytes(png)
    assert stylize(tmp_path / "in.png", tmp_path / "out.png").exit_code == 0
    np.testing.assert_array_equal(load(tmp_path / "out.png"), noise(9, 11))


def test_float_pictures(tmp_path: Path, models: Models) -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    save(tmp_path / "in.tif", values)
    assert stylize(tmp_path / "in.tif", tmp_path / "out.png").exit_code == 0
    np.testing.assert_array_equal(load(tmp_path / "out.png")[..., 0].ravel(), np.arange(256))
    values[3, 3] = np.nan
    save(tmp_path / "nan.tif", values)
    result = stylize(tmp_path / "nan.tif", tmp_path / "nan.png")
    assert result.exit_code == 1
    assert "NaN" in result.stderr


def test_rgb_colour_profile_is_kept_and_another_kind_dropped(tmp_path: Path, models: Models) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(tmp_path / "rgb.jpg", noise(16, 16), icc_profile=profile)
    assert stylize(tmp_path / "rgb.jpg", tmp_path / "out.png").exit_code == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.info["icc_profile"] == profile
    grey = profile[:16] + b"GRAY" + profile[20:]
    save(tmp_path / "grey.png", noise(16, 16, 1), icc_profile=grey)
    assert stylize(tmp_path / "grey.png", tmp_path / "grey-out.png").exit_code == 0
    with Image.open(tmp_path / "grey-out.png") as image:
        assert "icc_profile" not in image.info


def test_cmyk_with_an_unusable_profile_is_read_and_noted(tmp_path: Path, models: Models) -> None:
    Image.fromarray(noise(16, 16)).convert("CMYK").save(tmp_path / "in.jpg", icc_profile=b"\0" * 200)
    result = stylize(tmp_path / "in.jpg", tmp_path / "out.png")
    assert result.exit_code == 0
    assert "approximate" in result.stderr


@pytest.mark.parametrize("suffix", ["jpg", "webp", "tif", "bmp", "ppm", "tga", "jp2", "gif", "avif"])
def test_every_output_format(tmp_path: Path, models: Models, suffix: str) -> None:
    pixels = np.repeat(np.repeat(noise(2, 3), 16, 0), 16, 1)
    source = save(tmp_path / "in.png", pixels)
    result = stylize(source, tmp_path / f"out.{suffix}")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / f"out.{suffix}") as image:
        written = np.array(image.convert("RGB"))
    assert np.abs(written.astype(int) - pixels).mean() < 8


def test_quality_changes_the_file(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "in.png", noise(64, 64))
    for quality in (10, 95):
        assert stylize(source, tmp_path / f"{quality}.jpg", "--quality", quality).exit_code == 0
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size / 2
    assert stylize(source, tmp_path / "x.jpg", "--quality", 101).exit_code == 2


def test_size_is_the_longer_side(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "in.png", noise(30, 60))
    for size, shape in ((20, (10, 20, 3)), (121, (60, 121, 3)), (1, (1, 1, 3))):
        assert stylize(source, tmp_path / "out.png", "--size", size, "--force").exit_code == 0
        assert load(tmp_path / "out.png").shape == shape
    assert fit_longer_side(1000, 1, 10) == (10, 1)


def test_output_folder_takes_the_name(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "in.png", noise(8, 8))
    (tmp_path / "results").mkdir()
    assert stylize(source, tmp_path / "results").exit_code == 0
    assert files_in(tmp_path / "results") == ["in.png"]
    assert stylize(source, tmp_path / "new" / "deep" / "out.png").exit_code == 0
    assert (tmp_path / "new" / "deep" / "out.png").is_file()


def test_names_with_markup_and_upper_case_suffix(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "[red]photo[/red].PNG", noise(8, 8))
    result = stylize(source, tmp_path / "[bold].PNG")
    assert result.exit_code == 0
    assert "[bold].PNG" in result.stdout


# --- errors ---------------------------------------------------------------------------------------


def error_line(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.output
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_wrong_usage(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "in.png", noise(8, 8))
    clip = tmp_path / "in.mp4"
    clip.write_bytes(b"")
    out = tmp_path / "out.png"
    assert "does not exist" in error_line(stylize(tmp_path / "none.png", out), 2)
    assert "either --style" in error_line(stylize(source, out, style=None), 2)
    assert "either --style" in error_line(stylize(source, out, "-c", source), 2)
    assert "no such file" in error_line(stylize(source, out, "-c", tmp_path / "none.pth", style=None), 2)
    line = error_line(stylize(source, out, style="invrt"), 2)
    assert "unknown style 'invrt'" in line and "did you mean 'invert'" in line
    assert "--dtype" in error_line(stylize(source, out, "--dtype", "int8"), 2)
    assert "multiple of 4" in error_line(stylize(source, out, "--tile", 66), 2)
    assert stylize(source, out, "--tile", 8).exit_code == 2
    assert stylize(source, out, "--batch", 0).exit_code == 2
    assert stylize(source, out, "--size", 0).exit_code == 2
    assert "'.xyz'" in error_line(stylize(source, tmp_path / "out.xyz"), 2)
    assert "without a suffix" in error_line(stylize(source, tmp_path / "out"), 2)
    assert "must be one as well" in error_line(stylize(source, tmp_path / "out.mp4"), 2)
    assert "must be one as well" in error_line(stylize(clip, out), 2)
    assert "same file" in error_line(stylize(source, source, "--force"), 2)
    assert files_in(tmp_path) == ["in.mp4", "in.png"]


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:", "cuda:x", "CPU"):
        with pytest.raises(UsageError, match="--device must be"):
            choose_device(name)
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(UsageError, match="cuda:1"):
            choose_device("cuda:1")
    else:
        with pytest.raises(UsageError, match="the devices are"):
            choose_device("cuda:99")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda", 0)) == torch.float16


def test_nothing_is_overwritten_without_force(tmp_path: Path, models: Models) -> None:
    source = save(tmp_path / "in.png", noise(8, 8))
    target = tmp_path / "out.png"
    target.write_bytes(b"precious")
    assert "exists already" in error_line(stylize(source, target), 2)
    assert target.read_bytes() == b"precious"
    assert not models.loaded  # found out before any work
    assert stylize(source, target, "--force").exit_code == 0
    np.testing.assert_array_equal(load(target), noise(8, 8))


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path, models: Models) -> None:
    target = tmp_path / "out.png"

    class Slow(Identity):
        def forward(self, x: Tensor) -> Tensor:
            target.write_bytes(b"precious")
            return super().forward(x)

    models.styles["slow"] = Slow()
    source = save(tmp_path / "in.png", noise(8, 8))
    assert "exists already" in error_line(stylize(source, target, style="slow"), 1)
    assert target.read_bytes() == b"precious"
    assert files_in(tmp_path) == ["in.png", "out.png"]


def test_a_failed_write_leaves_nothing(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "in.png", noise(8, 8))
    old = save(tmp_path / "out.png", noise(4, 4)).read_bytes()

    def half(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    assert "No space left" in error_line(stylize(source, tmp_path / "out.png", "--force"), 1)
    assert (tmp_path / "out.png").read_bytes() == old
    assert files_in(tmp_path) == ["in.png", "out.png"]


def test_atomic_path(tmp_path: Path) -> None:
    target = tmp_path / "a" / ("long" * 60 + ".png")
    with atomic_path(target, overwrite=False) as temporary:
        temporary.write_bytes(b"1")
        assert not target.exists()
        assert temporary.suffix == ".png"
    assert target.read_bytes() == b"1"
    with pytest.raises(KeyboardInterrupt), atomic_path(target, overwrite=True) as temporary:
        temporary.write_bytes(b"2")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"1"
    assert len(files_in(tmp_path)) == 1
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(MediaError, match="cannot make the folder"),
        atomic_path(tmp_path / "file" / "x", overwrite=True),
    ):
        pass


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "empty"), (b"hello, this is text", "not a picture"), (None, "truncated")],
)
def test_broken_picture(tmp_path: Path, models: Models, content: bytes | None, problem: str) -> None:
    source = tmp_path / "in.png"
    if content is None:
        save(source, noise(64, 64))
        content = source.read_bytes()[:5000]
    source.write_bytes(content)
    line = error_line(stylize(source, tmp_path / "out.png"), 1)
    assert problem in line and "in.png" in line
    assert files_in(tmp_path) == ["in.png"]


def test_animation_is_refused(tmp_path: Path, models: Models) -> None:
    frames = [Image.fromarray(noise(8, 8, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "in.gif", save_all=True, append_images=frames[1:])
    assert "holds 3 pictures" in error_line(stylize(tmp_path / "in.gif", tmp_path / "out.png"), 1)


def test_too_many_pixels(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "in.png", noise(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "megapixels" in error_line(stylize(source, tmp_path / "out.png"), 1)


def test_not_finite_result(tmp_path: Path, models: Models) -> None:
    models.styles["nan"] = NotANumber()
    source = save(tmp_path / "in.png", noise(8, 8))
    line = error_line(stylize(source, tmp_path / "out.png", "--dtype", "bfloat16", style="nan"), 1)
    assert "NaN" in line and "float32" in line


def test_network_error_is_one_line_and_debug_shows_more(tmp_path: Path, models: Models) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("kernel went wrong\nlong story")

    models.styles["broken"] = Broken()
    source = save(tmp_path / "in.png", noise(8, 8))
    line = error_line(stylize(source, tmp_path / "out.png", style="broken"), 1)
    assert "kernel went wrong" in line and "--debug" in line
    result = stylize(source, tmp_path / "out.png", "--debug", style="broken")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "long story" in result.stderr


# --- folders --------------------------------------------------------------------------------------


def test_folder_keeps_the_structure_and_reports_broken_files(tmp_path: Path, models: Models) -> None:
    source = tmp_path / "in"
    pictures = {
        "a.png": noise(10, 12, seed=1),
        "b.PNG": noise(33, 21, seed=2),
        "sub/c.png": noise(10, 12, seed=3),
        "sub/deeper/a.png": noise(5, 5, seed=4),
    }
    for name, pixels in pictures.items():
        save(source / name, pixels)
    (source / "broken.jpg").write_bytes(b"no picture")
    (source / "sub" / "empty.png").write_bytes(b"")
    (source / "notes.txt").write_text("text")
    (source / "clip.mp4").write_bytes(b"")
    save(source / ".hidden.png", noise(8, 8))
    save(source / ".cache" / "x.png", noise(8, 8))
    result = stylize(source, tmp_path / "out", style="invert")
    assert result.exit_code == 1
    assert files_in(tmp_path / "out") == sorted(pictures)
    for name, pixels in pictures.items():
        np.testing.assert_array_equal(load(tmp_path / "out" / name), 255 - pixels)
    assert "wrote 4 of 6 pictures" in result.stdout
    assert "2 failed" in result.stderr and "broken.jpg" in result.stderr and "empty.png" in result.stderr
    assert "2 other files left out" in result.stderr and ".txt 1" in result.stderr
    assert "Traceback" not in result.output


def test_whole_folder(tmp_path: Path, models: Models) -> None:
    save(tmp_path / "in" / "a.png", noise(8, 8))
    result = stylize(tmp_path / "in", tmp_path / "out/")
    assert result.exit_code == 0
    assert result.stdout.startswith("wrote 1 of 1 pictures")
    assert result.stderr == ""


def test_folder_errors(tmp_path: Path, models: Models) -> None:
    source = tmp_path / "in"
    save(source / "a.png", noise(8, 8))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert "must be a folder" in error_line(stylize(source, tmp_path / "file"), 2)
    assert "must be a folder" in error_line(stylize(source, tmp_path / "out.png"), 2)
    assert "same folder" in error_line(stylize(source, source, "--force"), 2)
    assert "no pictures" in error_line(stylize(tmp_path / "empty", tmp_path / "out"), 2)
    save(tmp_path / "out" / "a.png", noise(4, 4))
    line = error_line(stylize(source, tmp_path / "out"), 2)
    assert "1 of 1 output files exist already" in line and "--force" in line
    assert load(tmp_path / "out" / "a.png").shape == (4, 4, 3)
    assert stylize(source, tmp_path / "out", "--force").exit_code == 0
    assert load(tmp_path / "out" / "a.png").shape == (8, 8, 3)


def test_output_inside_input_is_not_read_again(tmp_path: Path, models: Models) -> None:
    save(tmp_path / "a.png", noise(8, 8))
    for _ in range(2):
        assert stylize(tmp_path, tmp_path / "styled", "--force").exit_code == 0
    assert files_in(tmp_path) == ["a.png", "styled/a.png"]


def test_batches_hold_only_equal_sizes(tmp_path: Path, models: Models) -> None:
    sizes = [(8, 20), (24, 16)]
    pictures = {f"{index:02d}.png": noise(*sizes[index % 2], seed=index) for index in range(14)}
    for name, pixels in pictures.items():
        save(tmp_path / "in" / name, pixels)
    network = models.styles["same"]
    assert isinstance(network, Identity)
    assert stylize(tmp_path / "in", tmp_path / "out", "--batch", 3).exit_code == 0
    for name, pixels in pictures.items():
        np.testing.assert_array_equal(load(tmp_path / "out" / name), pixels)
    batches = [shape[0] for shape in network.shapes]
    assert sum(batches) == 14
    assert sorted(batches) == [1, 1, 3, 3, 3, 3]


def test_many_sizes_do_not_pile_up_in_memory(tmp_path: Path, models: Models) -> None:
    for index in range(40):
        save(tmp_path / "in" / f"{index:02d}.png", noise(8 + index, 8))
    network = models.styles["same"]
    assert isinstance(network, Identity)
    assert stylize(tmp_path / "in", tmp_path / "out", "--batch", 2).exit_code == 0
    assert len(files_in(tmp_path / "out")) == 40
    assert len(network.shapes) == 40


def test_automatic_batch() -> None:
    assert _run.batch_size(None, 512, 512, "cpu") == 1
    assert _run.batch_size(None, 512, 512, "cuda") == 8
    assert _run.batch_size(None, 1080, 1920, "cuda") == 1
    assert _run.batch_size(None, 5000, 5000, "cuda") == 1
    assert _run.batch_size(5, 5000, 5000, "cpu") == 5


# --- memory and tiles -----------------------------------------------------------------------------


def test_out_of_memory_gives_advice(tmp_path: Path, models: Models) -> None:
    models.styles["large"] = OutOfMemoryAbove(64 * 64)
    source = save(tmp_path / "in.png", noise(300, 900))
    line = error_line(stylize(source, tmp_path / "out.png", style="large"), 1)
    assert "out of memory with 900x300 pixels" in line
    assert "--size 450" in line and "--tile" in line
    assert files_in(tmp_path) == ["in.png"]
    assert stylize(source, tmp_path / "out.png", "--tile", 64, style="large").exit_code == 0
    np.testing.assert_array_equal(load(tmp_path / "out.png"), noise(300, 900))
    models.styles["larger"] = OutOfMemoryAbove(10)
    assert "smaller --tile" in error_line(
        stylize(source, tmp_path / "x.png", "--tile", 64, style="larger"), 1
    )


def test_a_batch_that_does_not_fit_goes_one_by_one(tmp_path: Path, models: Models) -> None:
    models.styles["large"] = network = OutOfMemoryAbove(16 * 16)
    for index in range(4):
        save(tmp_path / "in" / f"{index}.png", noise(16, 16, seed=index))
    save(tmp_path / "in" / "big.png", noise(40, 40))
    result = stylize(tmp_path / "in", tmp_path / "out", "--batch", 4, style="large")
    assert result.exit_code == 1
    assert files_in(tmp_path / "out") == ["0.png", "1.png", "2.png", "3.png"]
    assert [shape[0] for shape in network.shapes] == [1, 1, 1, 1]
    assert "big.png" in result.stderr and "out of memory" in result.stderr


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


class Greedy(nn.Module):
    """Asks for more and more memory."""

    def __init__(self, gigabytes: int) -> None:
        super().__init__()
        self.gigabytes = gigabytes

    def forward(self, x: Tensor) -> Tensor:
        return torch.empty(self.gigabytes << 28)


def test_real_cpu_allocation_failure_is_recognised() -> None:
    stylizer = Stylizer(Greedy(1 << 20), device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(PictureTooLargeError, match="tried to allocate 1125899906842624 bytes"):
        stylizer(noise(8, 8)[None])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not promise memory that they lack")
def test_memory_is_limited_to_what_is_there() -> None:
    available = available_memory()
    assert available is not None and available > 0
    with limited_to_available_memory(1 << 30):
        torch.empty(1 << 20)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(8 << 28)
    assert is_out_of_memory(caught.value)
    torch.empty(8 << 28)  # granted again, and never touched


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not promise memory that they lack")
def test_a_machine_with_little_memory_gives_advice_and_is_not_killed(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memory, "available_memory", lambda: 1 << 30)
    models.styles["greedy"] = Greedy(8)
    source = save(tmp_path / "in.png", noise(600, 800))
    line = error_line(stylize(source, tmp_path / "out.png", style="greedy"), 1)
    assert "out of memory with 800x600 pixels" in line and "--size 400" in line


@pytest.mark.parametrize("size", [(150, 130), (64, 300), (65, 64), (257, 1), (1000, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_reproduce_the_picture(size: tuple[int, int], dtype: torch.dtype) -> None:
    network = Identity()
    pixels = noise(*size)
    stylizer = Stylizer(network, device=torch.device("cpu"), dtype=dtype, tile=64)
    np.testing.assert_array_equal(stylizer(pixels[None])[0], pixels)
    assert all(shape[2] <= 64 and shape[3] <= 64 for shape in network.shapes)
    assert len(network.shapes) == len(tile_starts(size[0], 64, 16)) * len(tile_starts(size[1], 64, 16))


def test_tiles_blend_smoothly() -> None:
    """A network that adds another constant in each tile leaves no step at the seams."""

    class Steps(Identity):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (100.0 if len(self.shapes) % 2 else 0.0)

    grey = np.full((64, 112, 3), 50, np.uint8)
    result = Stylizer(Steps(), device=torch.device("cpu"), dtype=torch.float32, tile=64)(grey[None])[0]
    row = result[32, :, 0].astype(int)
    assert row[0] != row[-1]
    assert np.abs(np.diff(row)).max() <= 11  # a raised cosine of 16 pixels: at most 100 * pi / 2 / 16 a pixel


@pytest.mark.parametrize(("length", "tile"), [(64, 64), (65, 64), (1000, 64), (4001, 512), (10, 64)])
def test_tile_windows_add_up_to_one(length: int, tile: int) -> None:
    overlap = tile // 4
    starts = tile_starts(length, tile, overlap)
    windows = tile_windows(length, tile, starts, overlap)
    total = torch.zeros(length)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + window.numel()] += window
    torch.testing.assert_close(total, torch.ones(length))
    assert starts[0] == 0 and starts[-1] + min(tile, length) == length
    assert all(after - before <= tile - overlap for before, after in itertools.pairwise(starts))


def test_not_finite_is_found_in_tiles() -> None:
    stylizer = Stylizer(NotANumber(), device=torch.device("cpu"), dtype=torch.float32, tile=64)
    with pytest.raises(NotFiniteError):
        stylizer(noise(100, 100)[None])


def test_results_are_clamped_and_rounded() -> None:
    class Scale(Identity):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 4 - 300.4

    pixels = noise(16, 16)
    result = Stylizer(Scale(), device=torch.device("cpu"), dtype=torch.float32)(pixels[None])[0]
    np.testing.assert_array_equal(result, np.rint(np.clip(pixels * 4.0 - 300.4, 0, 255)).astype(np.uint8))


def test_compile(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_network(network: nn.Module) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", compile_network)
    source = save(tmp_path / "in.png", noise(8, 8))
    assert stylize(source, tmp_path / "out.png", "--compile").exit_code == 0
    assert compiled == [models.styles["same"]]


# --- picture objects ------------------------------------------------------------------------------


def test_picture_functions(tmp_path: Path) -> None:
    picture = Picture(noise(6, 7), dpi=(300.0, 300.0))
    write_picture(tmp_path / "a.png", picture)
    read = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(read.rgb, picture.rgb)
    assert read.dpi is not None and abs(read.dpi[0] - 300) < 0.1
    assert read.alpha is None and read.icc_profile is None
    with pytest.raises(MediaError, match="exists"):
        write_picture(tmp_path / "a.png", picture)
    with pytest.raises(MediaError, match=r"cannot write '\.doc'"):
        write_picture(tmp_path / "a.doc", picture)
    with pytest.raises(MediaError):
        read_picture(tmp_path / "none.png")
    with pytest.raises(MediaError):
        picture_size(tmp_path / "none.png")
    with pytest.raises(ValueError, match="rgb must be"):
        picture.with_rgb(noise(7, 6))
    with pytest.raises(MediaError, match="WEBP"):
        write_picture(tmp_path / "wide.webp", Picture(np.zeros((1, 20000, 3), np.uint8)))
    assert files_in(tmp_path) == ["a.png"]


# --- video ----------------------------------------------------------------------------------------


def make_video(
    path: Path,
    *,
    frames: int = 12,
    size: tuple[int, int] = (64, 96),
    rate: Fraction = Fraction(30000, 1001),
    audio: bool = True,
    matrix: tuple[int, int, int, int] | None = None,
    pts: list[int] | None = None,
) -> None:
    """A clip, its left half red, its top right quarter blue, that gets brighter; with a tone."""
    av = pytest.importorskip("av")
    height, width = size
    codec = "libvpx-vp9" if path.suffix == ".webm" else "libx264"
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate, options={"crf": "8"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        if matrix:
            a, b, c, d = (value << 16 for value in matrix)
            video.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        sound = (
            container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000)
            if audio
            else None
        )
        for index in range(frames):
            pixels = np.full((height, width, 3), 5 * index, np.uint8)
            pixels[:, : width // 2] = (200, 30, 30)
            pixels[: height // 2, width // 2 :] = (30, 30, 200)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], 1 / rate
            container.mux(video.encode(frame))
        if sound is not None:
            for index in range(round(frames / rate * 48000 / 1024)):
                tone = np.sin(np.arange(1024) * 0.05, dtype=np.float32).reshape(1, -1)
                chunk = av.AudioFrame.from_ndarray(np.repeat(tone, 2, 0), format="fltp", layout="stereo")
                chunk.sample_rate, chunk.pts, chunk.time_base = 48000, index * 1024, Fraction(1, 48000)
                container.mux(sound.encode(chunk))
            container.mux(sound.encode(None))
        container.mux(video.encode(None))


def read_video(path: Path) -> tuple[list[np.ndarray], list[float], Any]:
    """Frames as stored, their times in seconds, and the audio packets' bytes."""
    import av

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
        assert path.stem != "out" or all(frame.rotation == 0 for frame in frames)
        times = [float(frame.pts * frame.time_base) for frame in frames]
    with av.open(str(path)) as container:
        packets = container.demux(*container.streams.audio) if container.streams.audio else []
        audio = [bytes(packet) for packet in packets if packet.size]
    return pixels, times, audio


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "webm"])
def test_video_keeps_frames_times_and_audio(tmp_path: Path, models: Models, suffix: str) -> None:
    source, target = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    make_video(source)
    result = stylize(source, target, "--batch", 5, "--quality", 95)
    assert result.exit_code == 0, result.output
    assert "12 frames" in result.stdout
    before, times, audio = read_video(source)
    after, new_times, new_audio = read_video(target)
    assert len(after) == 12
    assert "note" not in result.stderr
    np.testing.assert_allclose(new_times, times, atol=2e-3)
    assert audio and new_audio == audio
    for old, new in zip(before, after, strict=True):
        assert old.shape == new.shape == (64, 96, 3)
        assert np.abs(old.astype(int) - new).mean() < 4
    assert files_in(tmp_path) == sorted([source.name, target.name])


def test_video_is_stylised(tmp_path: Path, models: Models) -> None:
    make_video(tmp_path / "in.mp4", audio=False)
    assert stylize(tmp_path / "in.mp4", tmp_path / "out.mkv", style="invert").exit_code == 0
    before, _, _ = read_video(tmp_path / "in.mp4")
    after, _, audio = read_video(tmp_path / "out.mkv")
    assert not audio
    assert np.abs(255 - before[6].astype(int) - after[6]).mean() < 6


@pytest.mark.parametrize(
    ("matrix", "turns"),
    # ISO/IEC 14496-12, track header: (x, y) is shown at (a x + c y, b x + d y), y downwards. The first is
    # what a phone held upright writes: the right edge as stored goes to the bottom, a quarter turn clockwise.
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_video_rotation_is_applied(
    tmp_path: Path, models: Models, matrix: tuple[int, int, int, int], turns: int
) -> None:
    make_video(tmp_path / "in.mp4", matrix=matrix)
    assert stylize(tmp_path / "in.mp4", tmp_path / "out.mp4").exit_code == 0
    before, _, _ = read_video(tmp_path / "in.mp4")
    after, _, _ = read_video(tmp_path / "out.mp4")
    expected = np.rot90(before[5], turns)
    assert after[5].shape == expected.shape
    assert np.abs(expected.astype(int) - after[5]).mean() < 6


def test_variable_frame_rate(tmp_path: Path, models: Models) -> None:
    make_video(tmp_path / "in.mkv", frames=6, audio=False, pts=[0, 1, 5, 6, 20, 21])
    assert stylize(tmp_path / "in.mkv", tmp_path / "out.mp4").exit_code == 0
    _, times, _ = read_video(tmp_path / "in.mkv")
    _, new_times, _ = read_video(tmp_path / "out.mp4")
    np.testing.assert_allclose(new_times, times, atol=2e-3)
    assert new_times[4] - new_times[3] > 0.4


def test_video_size_is_even(tmp_path: Path, models: Models) -> None:
    make_video(tmp_path / "in.mp4", frames=3)
    result = stylize(tmp_path / "in.mp4", tmp_path / "out.mp4", "--size", 51, "--tile", 64)
    assert result.exit_code == 0, result.output
    assert read_video(tmp_path / "out.mp4")[0][0].shape == (34, 50, 3)
    assert "50x34" in result.stderr


def test_video_into_a_folder_and_no_overwriting(tmp_path: Path, models: Models) -> None:
    make_video(tmp_path / "in.mp4", frames=3)
    (tmp_path / "out").mkdir()
    assert stylize(tmp_path / "in.mp4", tmp_path / "out").exit_code == 0
    content = (tmp_path / "out" / "in.mp4").read_bytes()
    assert "exists already" in error_line(stylize(tmp_path / "in.mp4", tmp_path / "out"), 2)
    assert (tmp_path / "out" / "in.mp4").read_bytes() == content
    assert stylize(tmp_path / "in.mp4", tmp_path / "out", "-f", style="invert").exit_code == 0
    assert (tmp_path / "out" / "in.mp4").read_bytes() != content


def test_broken_video_leaves_nothing(tmp_path: Path, models: Models) -> None:
    pytest.importorskip("av")
    (tmp_path / "in.mp4").write_bytes(b"not a video" * 100)
    line = error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.mp4"), 1)
    assert "in.mp4" in line
    assert files_in(tmp_path) == ["in.mp4"]


def test_truncated_video_gives_what_is_there_and_says_so(tmp_path: Path, models: Models) -> None:
    make_video(tmp_path / "whole.mkv", frames=40, size=(128, 128), audio=False)
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "in.mkv").write_bytes(data[: len(data) // 2])
    result = stylize(tmp_path / "in.mkv", tmp_path / "out.mkv")
    assert "Traceback" not in result.output
    count = len(read_video(tmp_path / "out.mkv")[0])
    assert 0 < count < 40
    assert f"{count} frames" in result.stdout
    assert "cut short" in result.stderr


def test_video_without_picture_stream(tmp_path: Path, models: Models) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "in.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert "no video stream" in error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.mp4"), 1)


def test_audio_that_does_not_fit_is_explained(tmp_path: Path, models: Models) -> None:
    make_video(tmp_path / "in.mp4")  # AAC, which WebM does not hold
    line = error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.webm"), 1)
    assert "aac" in line and ".mkv" in line
    assert files_in(tmp_path) == ["in.mp4"]


def test_video_failures_in_the_network_leave_nothing(tmp_path: Path, models: Models) -> None:
    models.styles["large"] = OutOfMemoryAbove(10)
    models.styles["nan"] = NotANumber()
    make_video(tmp_path / "in.mp4")
    line = error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.mp4", "--batch", 4, style="large"), 1)
    assert "--batch 1" in line
    assert "--size" in error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.mp4", style="large"), 1)
    assert "NaN" in error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.mp4", style="nan"), 1)
    assert files_in(tmp_path) == ["in.mp4"]


def test_missing_pyav_says_how_to_install_it(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    line = error_line(stylize(tmp_path / "in.mp4", tmp_path / "out.mp4"), 2)
    assert "pip install 'styleforge[video]'" in line
    assert not models.loaded


def test_prefetch_hands_on_errors_and_stops_early() -> None:
    def failing() -> Any:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), _run._Prefetch(failing(), 4) as items:
        assert next(items) == 1
        next(items)
    with _run._Prefetch(iter(range(10**9)), 2) as items:
        assert next(items) == 0
