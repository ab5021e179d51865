"""Every CUDA kernel once on small shapes, for compute-sanitizer; no test of its own.

Run ``compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize.py`` on a GPU machine (then
racecheck, initcheck and synccheck), with ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` so that the tools see every
allocation. Names of groups (norm, products, attention, formats, gradients, conv, or conv-contiguous and
conv-channels-last) restrict it to them; "captured", what runs in graphs, is a run of its own without that
variable: graphs need the cache. ``--no-conv`` leaves out cuDNN's and other libraries' large kernels,
``--no-copy-engine`` what reads results of cuBLAS: initcheck does not see its kernels' stores by the copy
engine and calls every such result uninitialised.
"""

from __future__ import annotations

import itertools
import os
import sys
from functools import partial

import torch

import styleforge
from styleforge.ops import (
    fused_attention,
    fused_conv_instance_norm_relu,
    fused_ffn,
    fused_instance_norm,
    pad_upsample,
)

# STYLEFORGE_PATH, shape
CASES = [
    ("", (2, 4, 12, 10)),
    ("", (1, 3, 5, 7)),
    ("", (1, 2, 96, 96)),
    ("", (1, 3, 100, 102)),
    ("", (1, 5, 128, 128)),
    ("", (1, 8, 64, 64)),
    ("plane", (1, 2, 192, 192)),
    ("split", (2, 5, 40, 33)),
    ("split", (1, 4, 96, 96)),
    ("portable", (1, 8, 24, 24)),
    ("bulk", (1, 4, 192, 192)),
    ("bulk", (2, 136, 12, 10)),
    ("stream", (1, 4, 96, 96)),
    ("stream", (2, 136, 12, 10)),
    ("resident", (2, 40, 24, 20)),
    ("resident", (1, 8, 32, 32)),
    ("held", (2, 40, 24, 20)),
    ("held", (1, 8, 64, 64)),
    ("", (1, 3, 32, 24)),
]


# STYLEFORGE_PATH, STYLEFORGE_CONV_TUNE: also several tiles a block
CONVOLUTIONS = [
    ("", ""),
    ("sm90", "tiles=2,columns=32,height=4"),
    ("sm90", "share=2,columns=32,height=4"),
    ("sm90", "share=2,columns=64,height=8"),
    *(("mma", f"tile={tile}") for tile in range(1, 8)),
]


def _fused_convolutions(channels_last: bool, paths: set[str]) -> None:
    """Our own convolutions, where the GPU has them: all kinds of arithmetic, tiles, borders and inputs."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    kinds = ((torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
    for (forced, tune), (dtype, precision) in itertools.product(CONVOLUTIONS, kinds):
        os.environ["STYLEFORGE_PATH"], os.environ["STYLEFORGE_CONV_TUNE"] = forced, tune
        for ci, co, kernel, upsample in ((64, 128, 3, 1), (32, 40, 3, 2), (72, 34, 5, 1), (3, 32, 9, 1)):
            x = torch.randn(1, ci, 21, 35, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
            w = torch.randn(co, ci, kernel, kernel, device="cuda", dtype=dtype)
            fused_conv_instance_norm_relu(
                x, w, padding=kernel // 2, padding_mode="reflect", upsample=upsample, precision=precision
            )
            path = styleforge.last_path()
            # Else it was cuDNN's, which takes some tools minutes.
            if "sm90" in path or "mma" in path or "picture" in path:
                paths.add(path)
        for ci, co, kernel, stride in (
            (64, 64, 3, 1),
            (128, 128, 3, 1),
            (128, 256, 1, 1),
            (64, 128, 3, 2),
        ):  # whole tiles
            x = torch.randn(1, ci, 32, 32, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
            w = torch.randn(co, ci, kernel, kernel, device="cuda", dtype=dtype)
            fused_conv_instance_norm_relu(x, w, stride=stride, padding=kernel // 2, precision=precision)
            paths.add(styleforge.last_path())
        x = torch.randn(1, 32, 21, 35, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
        w = torch.randn(3, 32, 9, 9, device="cuda", dtype=dtype)
        torch.ops.styleforge._reflect_conv2d(x, w, None, precision)
        paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = os.environ["STYLEFORGE_CONV_TUNE"] = ""
    for dtype, precision in kinds:  # a first layer of several tiles a block
        x = torch.randn(1, 3, 272, 300, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
        w = torch.randn(8, 3, 9, 9, device="cuda", dtype=dtype)
        fused_conv_instance_norm_relu(x, w, padding=4, padding_mode="reflect", precision=precision)
        paths.add(styleforge.last_path())


def _captured_convolutions(paths: set[str]) -> None:
    """Resident grids of a graph that are not cooperative: as usual, and called off (gate=3)."""
    tf32, half = (torch.float32, "tf32"), (torch.float16, "ieee")
    cuts = (
        ("columns=128", tf32),
        ("columns=128", half),
        ("share=2,columns=64,height=8", tf32),
    )
    options = ("gate=3,lean=1", "gate=3,lean=2", "gate=3,lean=2,merged=1", "gate=2", "gate=2,tiles=2")
    formats = torch.channels_last, torch.contiguous_format
    for (cut, (dtype, precision)), option, (ci, co, kernel, stride), memory_format in itertools.product(
        cuts, options, ((128, 128, 3, 1), (64, 128, 3, 2)), formats
    ):
        os.environ["STYLEFORGE_CONV_TUNE"] = f"{cut},{option}"
        size = 32 * stride
        x = torch.randn(1, ci, size, size, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
        w = torch.randn(co, ci, kernel, kernel, device="cuda", dtype=dtype)
        w = w.contiguous(memory_format=memory_format)
        call = partial(
            fused_conv_instance_norm_relu, x, w, stride=stride, padding=kernel // 2, precision=precision
        )
        eager = call()
        paths.add(styleforge.last_path())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call(), call(residual=eager)]
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(results[0], eager), (cut, option, ci)
    os.environ["STYLEFORGE_CONV_TUNE"] = ""


def _memory_formats(paths: set[str]) -> None:
    """Copies between the formats, and results in NCHW: rows that are whole 16-byte pieces, and not."""
    for dtype in (torch.float16, torch.float32):
        for sizes in ((2, 72, 9, 8), (1, 5, 3, 7)):
            x = torch.randn(sizes, device="cuda", dtype=dtype)
            y = x.contiguous(memory_format=torch.channels_last)
            fused_instance_norm(x, residual=y)
            fused_instance_norm(y, residual=x)
        for width, activation in ((40, "relu"), (37, "silu")):
            x = torch.randn(1, 64, 21, width, device="cuda", dtype=dtype)
            w = torch.randn(72, 64, 3, 3, device="cuda", dtype=dtype)
            r = torch.randn(1, 72, 21, width, device="cuda", dtype=dtype)
            for forced in ("sm90", "sm90:two_pass"):
                os.environ["STYLEFORGE_PATH"] = forced
                for precision in ("tf32", "ieee"):
                    fused_conv_instance_norm_relu(
                        x, w, padding=1, activation=activation, residual=r, precision=precision
                    )
                    paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = ""


def _feed_forward_networks(paths: set[str]) -> None:
    """Forward and backward, in vectors and in single elements; the products are cuBLAS's where not ours."""
    for dtype in (torch.float32, torch.float16):
        for embed, hidden, activation in (
            (32, 64, "gelu"),
            (7, 13, "gelu_tanh"),
            (16, 24, "silu"),
            (8, 8, "relu"),
        ):
            sizes = ((5, embed), (hidden, embed), (hidden,), (embed, hidden), (embed,))
            leaves = [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in sizes]
            y = fused_ffn(*leaves, activation=activation, residual=leaves[0])
            paths.add(styleforge.last_path())
            y.backward(torch.randn_like(y))
            paths.add(styleforge.last_path())


def _attention(paths: set[str]) -> None:
    """Every path, forward and backward; head sizes that are padded and that are not, masks."""
    for forced in ("", "flash", "efficient", "math", "sm90"):
        os.environ["STYLEFORGE_PATH"] = forced
        for dtype in (torch.float32, torch.float16):
            for length, embed, heads, is_causal in ((37, 32, 4, True), (70, 39, 3, False), (8, 16, 1, True)):
                sizes = ((2, length, embed), (3 * embed, embed), (3 * embed,), (embed, embed), (embed,))
                leaves = [torch.randn(s, device="cuda", dtype=dtype).requires_grad_() for s in sizes]
                for mask in (None, torch.rand(2, length, device="cuda") < 0.5):
                    y = fused_attention(*leaves, heads, is_causal=is_causal, key_padding_mask=mask)
                    paths.add(styleforge.last_path())
                    y.backward(torch.randn_like(y))
                    paths.add(styleforge.last_path())
    # Blocks of "together" ask for each other's flags before these are written; initcheck says so, rightly.
    for forced, dtype, precision in (
        ("together", torch.float32, "ieee"),
        ("together", torch.float32, "tf32"),
        ("dependent", torch.float32, "ieee"),
        ("dependent", torch.float32, "tf32"),
        ("dependent", torch.float16, "ieee"),
        ("dependent", torch.bfloat16, "ieee"),
    ):
        os.environ["STYLEFORGE_PATH"] = forced
        for length, embed, heads in ((37, 32, 4), (150, 128, 2), (40, 104, 1)):
            if forced == "together" and embed // heads > 64:  # which it leaves to others
                continue
            sizes = ((2, length, embed), (3 * embed, embed), (3 * embed,), (embed, embed), (embed,))
            tensors = [torch.randn(s, device="cuda", dtype=dtype) for s in sizes]
            for mask in (None, torch.rand(2, length, device="cuda") < 0.5):
                rest = (heads, None, mask is None, mask, precision)
                torch.ops.styleforge._fused_attention_forward(*tensors, *rest, 1)
                paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = "whole"
    for dtype in (torch.float16, torch.bfloat16):
        for length, embed, heads, rows in (
            (150, 128, 4, 16),
            (40, 128, 4, 32),
            (300, 128, 4, 32),
            (150, 256, 4, 16),
            (40, 256, 8, 32),
        ):
            os.environ["STYLEFORGE_SMALL_ATTENTION_TUNE"] = f"block={rows}"
            sizes = ((2, length, embed), (3 * embed, embed), (3 * embed,), (embed, embed), (embed,))
            tensors = [torch.randn(s, device="cuda", dtype=dtype) for s in sizes]
            for mask in (None, torch.rand(2, length, device="cuda") < 0.5):
                torch.ops.styleforge.fused_attention_v1(*tensors, heads, None, mask is None, mask)
                paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_SMALL_ATTENTION_TUNE"] = ""
    os.environ["STYLEFORGE_PATH"] = ""


def _matrix_products(paths: set[str]) -> None:
    """Our own matrix products, where the GPU has them: both kernels, whole tiles and ragged ones."""
    os.environ["STYLEFORGE_PATH"] = "sm90"
    shapes = ((130, 64, 128, 64), (197, 100, 332, 77), (40, 516, 36, 3))
    wide = ((130, 64, 128, 64), (197, 100, 332, 76), (2200, 36, 1024, 132))
    pieces = "small=1,memory=16,depth=64,room=2"
    for tune in (
        "small=1",
        "small=2,columns=64",
        "small=2,columns=32,cluster=4",
        "one=2",
        "one=2,rows=16,parts=4",
        "one=2,rows=32,parts=2",
        "wide=2",
        "wide=2,columns=192",
        pieces,
    ):
        os.environ["STYLEFORGE_GEMM_TUNE"] = tune
        for precision in ("tf32",) if "wide=2" in tune else ("ieee", "tf32"):
            for rows, embed, hidden, out in wide if "wide=2" in tune else shapes:
                sizes = ((rows, embed), (hidden, embed), (hidden,), (out, hidden), (out,), (rows, out))
                x, *parameters, r = (torch.randn(s, device="cuda") for s in sizes)
                fused_ffn(x, *parameters, residual=r, precision=precision)
                if "sm90" not in styleforge.last_path():
                    continue
                paths.add(styleforge.last_path())
                torch.ops.styleforge._fused_ffn_forward(x, *parameters, "silu", None, precision)
    os.environ["STYLEFORGE_PATH"] = os.environ["STYLEFORGE_GEMM_TUNE"] = ""


def _half_matrix_products(paths: set[str]) -> None:
    """The same of 16 bits: blocks with several tiles, and all in one launch."""
    os.environ["STYLEFORGE_PATH"] = "sm90"
    for tune in ("small=1", "small=1,columns=192", "small=1,narrow=4", "one=2", "one=2,parts=2,units=2"):
        os.environ["STYLEFORGE_GEMM_TUNE"] = tune
        for dtype in (torch.float16, torch.bfloat16):
            for rows, embed, hidden, out in ((130, 64, 128, 64), (197, 104, 328, 72), (2200, 72, 1024, 136)):
                sizes = ((rows, embed), (hidden, embed), (hidden,), (out, hidden), (out,), (rows, out))
                x, *parameters, r = (torch.randn(s, device="cuda", dtype=dtype) for s in sizes)
                fused_ffn(x, *parameters, residual=r)
                if "16bit" not in styleforge.last_path():
                    continue
                paths.add(styleforge.last_path())
                _, kept = torch.ops.styleforge._fused_ffn_forward(x, *parameters, "silu", None, "ieee")
                torch.ops.styleforge._fused_ffn_backward(
                    r, x, kept, *parameters[:3], "silu", "ieee", True, True, True, True, True
                )
                paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = os.environ["STYLEFORGE_GEMM_TUNE"] = ""


def _tiled_attention(paths: set[str]) -> None:
    """Our own attention of float32, where the GPU has it: each head size, whole rows and not, masks."""
    os.environ["STYLEFORGE_PATH"] = "sm90"
    forward = torch.ops.styleforge._fused_attention_forward
    backward = torch.ops.styleforge._fused_attention_backward
    for length, embed, heads in (
        (200, 64, 2),
        (197, 64, 1),
        (140, 128, 1),
        (197, 120, 1),
        (70, 36, 4),
        (300, 132, 3),
        (75, 256, 1),
        (133, 150, 1),
    ):
        sizes = ((2, length, embed), (3 * embed, embed), (3 * embed,), (embed, embed), (embed,))
        tensors = [torch.randn(s, device="cuda") for s in sizes]
        for is_causal, mask in (
            (False, None),
            (True, None),
            (True, torch.rand(2, length, device="cuda") < 0.5),
        ):
            _, *kept = forward(*tensors, heads, None, is_causal, mask, "ieee", 2)
            if "sm90" not in styleforge.last_path():
                continue
            paths.add(styleforge.last_path())
            if embed // heads <= 64:
                needed = (True, False, False, False, False)
                given = (tensors[0], tensors[0], *kept, tensors[1], tensors[3])
                backward(*given, heads, None, is_causal, mask, "ieee", *needed)
                paths.add(styleforge.last_path())
    # Their gradients begin with a product of cuBLAS.
    half = () if "--no-copy-engine" in sys.argv else (torch.float16, torch.bfloat16)
    shapes = ((200, 2, 64), (70, 3, 40), (140, 1, 128))
    for dtype, (length, heads, head_dim) in itertools.product(half, shapes):
        embed = heads * head_dim
        qkv = torch.randn(2, length, 3 * embed, device="cuda", dtype=dtype)
        q, k = qkv.float().view(2, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)[:2]
        logsumexp = (q @ k.transpose(-1, -2) * head_dim**-0.5).logsumexp(-1)
        x, weight = qkv[..., :embed].contiguous(), torch.randn(4 * embed, embed, device="cuda", dtype=dtype)
        for is_causal, mask in ((False, torch.rand(2, length, device="cuda") < 0.5), (True, None)):
            given = (x, x, qkv, x, logsumexp, weight[embed:], weight[:embed])
            backward(*given, heads, None, is_causal, mask, "ieee", True, False, False, False, False)
            paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = ""


def _instance_norms(paths: set[str]) -> None:
    """Every path, forward and backward."""
    device = torch.device("cuda")
    for forced, shape in CASES:
        os.environ["STYLEFORGE_PATH"] = forced
        for dtype in (torch.float32, torch.float16):
            for channels_last in (False, True):
                x = torch.randn(shape).to(device, dtype)
                if channels_last:
                    x = x.contiguous(memory_format=torch.channels_last)
                weight = torch.rand(shape[1]).to(device, dtype)
                residual = torch.randn(shape).to(device, dtype)
                for leaf in (x, weight, residual):
                    leaf.requires_grad_()
                y = fused_instance_norm(x, weight, weight, activation="silu", residual=residual)
                paths.add(styleforge.last_path())
                y.backward(torch.randn(shape).to(device, dtype))
                paths.add(styleforge.last_path())
                # The derivative from the argument, from the result.
                for other in (None, residual) if forced == "held" and channels_last else ():
                    for tune in ("threads=64", "lanes=1,threads=64"):
                        os.environ["STYLEFORGE_TUNE"] = tune
                        y = fused_instance_norm(x, weight, weight, activation="relu", residual=other)
                        paths.add(styleforge.last_path())
                        y.backward(torch.randn(shape).to(device, dtype))
                        paths.add(styleforge.last_path())
                os.environ["STYLEFORGE_TUNE"] = ""
    # The ticket kernel, which is for tensors larger than the cache: forced on a small one.
    os.environ["STYLEFORGE_PATH"] = "ticket"
    os.environ["STYLEFORGE_TUNE"] = "lead=3,tile=256"
    with torch.inference_mode():
        fused_instance_norm(torch.randn(2, 3, 64, 64, device=device))
        paths.add(styleforge.last_path())
    with torch.inference_mode():
        # Clusters with several units each, blocks with several tiles, and without any.
        os.environ["STYLEFORGE_PATH"] = ""
        tunes = "units=2,grid=2", "units=2,lanes=2,cluster=2,grid=3", "teams=2,grid=6", "teams=3,lanes=4"
        for tune in tunes:
            os.environ["STYLEFORGE_TUNE"] = tune
            for dtype in (torch.float32, torch.float16):
                for shape in ((3, 128, 40, 33), (2, 64, 5, 3)):
                    x = torch.randn(shape, device=device, dtype=dtype)
                    x = x.contiguous(memory_format=torch.channels_last)
                    fused_instance_norm(x, residual=x)
                    paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = os.environ["STYLEFORGE_TUNE"] = ""


def _convolution_gradients(paths: set[str]) -> None:
    os.environ["STYLEFORGE_PATH"] = "sm90"
    device = torch.device("cuda")
    for stride, channels, tune in ((1, 40, ""), (1, 72, "boxes=3,splits=3,stages=2"), (2, 64, "splits=5")):
        os.environ["STYLEFORGE_GRADIENT_TUNE"] = tune
        x = torch.randn(2, channels, 19, 37, device=device, dtype=torch.float16)
        w = torch.randn(72, channels, 3, 3, device=device, dtype=torch.float16)
        grad = torch.randn(2, 72, -(-19 // stride), -(-37 // stride), device=device, dtype=torch.float16)
        for mode in ("zeros", "reflect"):
            both = (stride, stride), (1, 1), mode, stride == 1, True
            torch.ops.styleforge._convolution_backward(grad, x, w, *both)
            paths.add(styleforge.last_path())
    os.environ["STYLEFORGE_PATH"] = os.environ["STYLEFORGE_GRADIENT_TUNE"] = ""


def main() -> None:
    paths: set[str] = set()
    device = torch.device("cuda")
    wanted = [name for name in sys.argv[1:] if not name.startswith("-")]

    def runs(name: str) -> bool:
        return not wanted or name in wanted

    if runs("norm"):
        _instance_norms(paths)
    with torch.inference_mode():
        if runs("products"):
            _matrix_products(paths)
            _half_matrix_products(paths)
        if runs("attention"):
            _tiled_attention(paths)
    if "--no-conv" not in sys.argv:
        if runs("products"):
            _feed_forward_networks(paths)
        if runs("attention"):
            _attention(paths)
    with torch.inference_mode():
        # Elsewhere it is cuDNN's, which takes some tools minutes.
        hopper = torch.cuda.get_device_capability() == (9, 0)
        if runs("formats") and hopper:
            _memory_formats(paths)
        if runs("gradients") and hopper:
            _convolution_gradients(paths)
        if "captured" in wanted and hopper:
            _captured_convolutions(paths)
        for channels_last, half in ((False, "conv-contiguous"), (True, "conv-channels-last")):
            if not runs("conv") and half not in wanted:
                continue
            x = torch.randn(1, 8, 9, 11, device=device)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            padded = pad_upsample(x, (2, 1), padding_mode="reflect", upsample=2)
            torch.ops.styleforge._pad_upsample_backward(padded, (2, 1), "reflect", 2)
            torch.ops.styleforge._unfold_columns(x[:, :3], 5, (2, 2), "reflect")
            torch.ops.styleforge._widen(x.half())
            grad, wide = (torch.randn(2, 32, rows, 70, device=device).half() for rows in (12, 15))
            torch.ops.styleforge._column_gradient(grad, wide)
            _fused_convolutions(channels_last, paths)
            if "--no-conv" in sys.argv:  # cuDNN's own kernels make some tools take minutes
                continue
            w = torch.randn(8, 8, 3, 3, device=device)
            fused_conv_instance_norm_relu(x, w, padding=1, padding_mode="reflect", upsample=2)
            paths.add(styleforge.last_path())
            fused_conv_instance_norm_relu(x[:, :3].half(), w[:, :3].half(), padding=1)
            paths.add(styleforge.last_path())
    torch.cuda.synchronize()
    print("\n".join(sorted(paths)))


if __name__ == "__main__":
    main()
