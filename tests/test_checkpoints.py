"""Checkpoint files in and out, and the styles of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from styleforge.models import (
    CheckpointError,
    TorchTransformerNet,
    TransformerNet,
    UnknownStyleError,
    available_styles,
    load_checkpoint,
    load_style,
    read_metadata,
    read_state_dict,
    save_checkpoint,
)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(TorchTransformerNet(2).state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".model", ".safetensors", ".PTH"])
def test_round_trip(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    save_checkpoint(state, path)
    net = load_checkpoint(path)
    assert isinstance(net, TransformerNet)
    assert not net.training
    assert net.base_channels == 2
    assert same(dict(net.state_dict()), state)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_old_public_checkpoint_with_running_statistics(tmp_path: Path, state: dict[str, Tensor]) -> None:
    old = dict(state)
    for name in ("in1", "in5", "res3.in2"):
        old[f"{name}.running_mean"] = torch.zeros(2)
        old[f"{name}.running_var"] = torch.ones(2)
        old[f"{name}.num_batches_tracked"] = torch.tensor(7)
    torch.save(old, tmp_path / "candy.model")
    assert same(read_state_dict(tmp_path / "candy.model"), state)
    # The format of PyTorch before 1.6, which the public files have.
    torch.save(old, tmp_path / "candy.pth", _use_new_zipfile_serialization=False)
    assert same(dict(load_checkpoint(tmp_path / "candy.pth").state_dict()), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("model", "state_dict")])
def test_prefixes_and_nesting(
    tmp_path: Path, state: dict[str, Tensor], prefix: str, nest: tuple[str, ...]
) -> None:
    wrapped: dict = {prefix + name: tensor for name, tensor in state.items()}
    for key in nest:
        wrapped = {key: wrapped, "epoch": 3}
    torch.save(wrapped, tmp_path / "net.pth")
    assert same(read_state_dict(tmp_path / "net.pth"), state)


def test_missing_and_unexpected_parameters_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["in4.weight"]
    state["deconv9.weight"] = torch.zeros(1)
    save_checkpoint(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"net\.pth does not fit") as caught:
        load_checkpoint(tmp_path / "net.pth")
    assert caught.value.missing == ("in4.weight",)
    assert caught.value.unexpected == ("deconv9.weight",)
    assert "missing in4.weight" in str(caught.value)
    assert "unexpected deconv9.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_shape_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["res2.conv1.conv2d.weight"] = torch.zeros(8, 8, 5, 5)
    save_checkpoint(state, tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "net.safetensors")
    assert caught.value.mismatched == ("res2.conv1.conv2d.weight",)
    assert "res2.conv1.conv2d.weight [8, 8, 5, 5] instead of [8, 8, 3, 3]" in str(caught.value)


def test_another_network_is_recognised(tmp_path: Path) -> None:
    save_checkpoint({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match=r"no TransformerNet checkpoint .*features\.0\.weight"):
        load_checkpoint(tmp_path / "vgg.pth")
    save_checkpoint({"conv1.conv2d.weight": torch.zeros(32, 4, 9, 9)}, tmp_path / "rgba.pth")
    with pytest.raises(CheckpointError, match=r"\[base_channels, 3, 9, 9\], got \[32, 4, 9, 9\]"):
        load_checkpoint(tmp_path / "rgba.pth")


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save(TorchTransformerNet(1), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match="state_dict") as caught:
        read_state_dict(tmp_path / "module.pth")
    assert "\n" not in str(caught.value) and "two options" not in str(caught.value)


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02garbage" * 20])
def test_broken_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(tmp_path / name)
    assert "weights_only" not in str(caught.value)  # torch.load's advice: run the code in the file


def test_entries_that_are_no_tensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({**state, "epoch": 3}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="'epoch' must be a tensor, got int"):
        read_state_dict(tmp_path / "net.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="must hold a state dict, got list"):
        read_state_dict(tmp_path / "list.pth")


def test_missing_file_and_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        load_checkpoint(tmp_path / "net.t7")
    with pytest.raises(CheckpointError, match=r"must end in"):
        save_checkpoint({}, tmp_path / "net.bin")


def test_half_precision_and_metadata(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "net.safetensors"
    save_checkpoint(state, path, dtype=torch.float16, metadata={"description": "blue"})
    assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {torch.float16}
    assert read_metadata(path) == {"description": "blue"}
    assert load_checkpoint(path).conv1.conv2d.weight.dtype == torch.float16
    save_checkpoint(state, tmp_path / "net.pth")
    assert read_metadata(tmp_path / "net.pth") == {}
    with pytest.raises(CheckpointError, match="metadata"):
        save_checkpoint(state, tmp_path / "net.pth", metadata={"description": "blue"})


def test_save_keeps_the_old_file_when_interrupted(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.pth"
    save_checkpoint(state, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"x": torch.zeros(1)}, path)
    assert path.read_bytes() == before


def test_styles_of_the_package() -> None:
    styles = available_styles()
    assert len(styles) >= 2
    assert [style.name for style in styles] == sorted(style.name for style in styles)
    for style in styles:
        assert style.description
        assert style.path.stat().st_size <= 4_000_000
        card = style.card.read_text(encoding="utf-8")
        for word in (f"`{style.name}`", "steps", "licence", "Gram", "photos"):
            assert word in card, f"{style.card.name} does not mention {word}"
        net = load_style(style.name)
        assert not net.training
        assert net.base_channels == 32
        assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
        assert load_style(style.name, dtype=torch.bfloat16).in1.weight.dtype == torch.bfloat16


def test_styles_paint_pictures_that_keep_light_and_dark_apart() -> None:
    photo = torch.full((1, 3, 64, 96), 30.0)
    photo[..., 48:] = 220.0
    for style in available_styles():
        with torch.no_grad():
            result = load_style(style.name)(photo).clamp(0, 255)
        assert result[..., 56:].mean() > result[..., :40].mean() + 10, style.name
        assert result.std() > 20, style.name


def test_unknown_style_lists_those_there_are() -> None:
    with pytest.raises(UnknownStyleError) as caught:
        load_style("no-such-style")
    assert "'no-such-style'" in str(caught.value)
    for style in available_styles():
        assert style.name in str(caught.value)
    for escape in ("../models/x", "mosaic.safetensors", ""):
        with pytest.raises(UnknownStyleError):
            load_style(escape)
