"""The cases of the performance tables.

    python -m styleforge.bench.operators [norm conv ffn heads net host backward cpu] [--no-compile]

Prints one line a case: microseconds of GPU time for eager PyTorch, ``torch.compile`` and styleforge, and the
ratios. Every styleforge result is compared with eager before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import styleforge
from styleforge.bench.floors import copy_rate
from styleforge.bench.timing import cpu_times, graph_time, host_time, peak_memory
from styleforge.ops import fused_conv_instance_norm_relu, fused_instance_norm

NORM_SHAPES = [(4, 64, 256, 256), (1, 3, 512, 512), (1, 64, 1024, 1024), (16, 128, 128, 128)]

# batch, in, out, size, kernel, stride
CONV_CASES = [
    (1, 64, 64, 64, 3, 1),
    (1, 128, 128, 128, 3, 1),
    (1, 64, 64, 256, 3, 1),
    (1, 128, 128, 32, 3, 1),
    (1, 256, 256, 64, 1, 1),
    (1, 64, 128, 128, 3, 2),
    (8, 128, 128, 64, 3, 1),
]

# batch, length, embed, hidden
FFN_CASES = [
    (8, 1024, 512, 2048),
    (4, 2048, 768, 3072),
    (2, 4096, 1024, 4096),
    (1, 2048, 4096, 11008),
    (1, 256, 128, 512),
]

# batch, length, heads, head_dim; float32
HEADS_CASES = [
    (8, 1024, 16, 64),
    (1, 4096, 32, 128),
    (1, 4096, 8, 256),
    (8, 1024, 4, 256),
    (4, 2048, 4, 160),
]

Baselines = dict[str, float]


def _formatted(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _check(ours: Tensor, reference: Tensor, tolerance: float) -> None:
    difference = (ours.double() - reference.double()).norm() / reference.double().norm()
    if not difference < tolerance:
        raise SystemExit(f"wrong result: relative difference {difference:.3g}, allowed {tolerance:.3g}")


def _line(name: str, ours: float, baselines: Baselines, note: str = "") -> None:
    columns = [f"{name:44s} ours {ours:8.2f}"]
    columns += [f"{key} {value:8.2f} ({ours / value:4.2f}x)" for key, value in baselines.items()]
    print("  ".join(columns), note, flush=True)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True)


def bench_norm(compile: bool) -> None:
    """Instance norm + affine + ReLU, NCHW and channels_last, against the better format of each baseline."""
    rate = copy_rate(torch.device("cuda"))
    print(f"copy rate {rate:.2f} TB/s")
    for shape in NORM_SHAPES:
        for dtype in (torch.float32, torch.float16):
            bytes_once = torch.empty(shape, dtype=dtype, device="meta").nbytes
            rotate = max(1, min(4, int(2e8 // bytes_once)))
            weight = torch.randn(shape[1], device="cuda", dtype=dtype)
            bias = torch.randn(shape[1], device="cuda", dtype=dtype)

            def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
                return F.relu(F.instance_norm(x, weight=w, bias=b))

            compiled = _compiled(eager)
            best: Baselines = {}
            results: dict[str, float] = {}
            notes: dict[str, str] = {}
            for channels_last in (False, True):
                xs = [
                    _formatted(torch.randn(shape, device="cuda", dtype=dtype), channels_last)
                    for _ in range(rotate)
                ]
                _check(
                    fused_instance_norm(xs[0], weight, bias, activation="relu"),
                    eager(xs[0].double(), weight.double(), bias.double()),
                    2e-3 if dtype == torch.float16 else 1e-5,
                )
                times = {"eager": graph_time([partial(eager, x, weight, bias) for x in xs])}
                if compile:
                    times["compile"] = graph_time([partial(compiled, x, weight, bias) for x in xs])
                for key, value in times.items():
                    best[key] = min(best.get(key, value), value)
                ours = graph_time(
                    [partial(fused_instance_norm, x, weight, bias, activation="relu") for x in xs]
                )
                layout = "channels_last" if channels_last else "nchw"
                share = 2 * bytes_once / ours / 1e6 / rate
                results[layout] = ours
                notes[layout] = f"{100 * share:.0f}% of copy, {styleforge.last_path()}"
            for layout, ours in results.items():
                name = f"norm {'x'.join(map(str, shape))} {str(dtype)[6:]} {layout}"
                _line(name, ours, best, notes[layout])


def bench_conv(compile: bool, precisions: Sequence[str] = ("fp16", "tf32", "ieee")) -> None:
    """Conv + instance norm + ReLU, both formats, against the better format of each baseline."""
    for batch, cin, cout, size, kernel, stride in CONV_CASES:
        for precision in precisions:
            dtype = torch.float16 if precision == "fp16" else torch.float32
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            weight = (
                torch.randn(cout, cin, kernel, kernel, device="cuda", dtype=dtype) / (cin * kernel**2) ** 0.5
            )
            scale = torch.randn(cout, device="cuda", dtype=dtype)
            shift = torch.randn(cout, device="cuda", dtype=dtype)
            bias = torch.randn(cout, device="cuda", dtype=dtype)

            def eager(
                x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor, k: int = kernel, st: int = stride
            ) -> Tensor:
                return F.relu(F.instance_norm(F.conv2d(x, w, b, st, k // 2), weight=s, bias=t))

            compiled = _compiled(eager)
            best: Baselines = {}
            results: dict[bool, float] = {}
            paths: dict[bool, str] = {}
            for channels_last in (False, True):
                x = _formatted(torch.randn(batch, cin, size, size, device="cuda", dtype=dtype), channels_last)
                w = _formatted(weight, channels_last)

                ours = partial(
                    fused_conv_instance_norm_relu,
                    x,
                    w,
                    bias,
                    scale,
                    shift,
                    stride=stride,
                    padding=kernel // 2,
                    precision="tf32" if precision == "tf32" else "ieee",
                )
                reference = eager(x.double(), w.double(), bias.double(), scale.double(), shift.double())
                _check(ours(), reference, {"fp16": 3e-3, "tf32": 2e-3, "ieee": 1e-5}[precision])
                times = {"eager": graph_time([partial(eager, x, w, bias, scale, shift)])}
                if compile:
                    times["compile"] = graph_time([partial(compiled, x, w, bias, scale, shift)])
                for key, value in times.items():
                    best[key] = min(best.get(key, value), value)
                results[channels_last] = graph_time([ours])
                paths[channels_last] = styleforge.last_path()
            for channels_last, time in results.items():
                name = f"conv {batch}x{cin}->{cout} @{size} k{kernel}s{stride} {precision} "
                _line(name + ("nhwc" if channels_last else "nchw"), time, best, paths[channels_last])
    torch.backends.cudnn.allow_tf32 = True


def _peak(call: Callable[[], Any]) -> float:
    """MB that a call holds at most, beyond what was there and what cuBLAS keeps from its first call."""
    call()
    return peak_memory(call) / 2**20


def bench_ffn(
    compile: bool,
    cases: Sequence[tuple[int, int, int, int]] = FFN_CASES,
    precisions: Sequence[str] = ("ieee", "tf32", "bf16", "fp16"),
) -> None:
    """Linear, erf-GELU, linear: inference, and a training step of the cases but the two last ones."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    before = torch.backends.cuda.matmul.allow_tf32
    for batch, length, embed, hidden in cases:
        for precision in precisions:
            dtype = dtypes.get(precision, torch.float32)
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            linear = partial(torch.nn.Linear, device="cuda", dtype=dtype)
            plain = torch.nn.Sequential(linear(embed, hidden), torch.nn.GELU(), linear(hidden, embed)).eval()
            ours = styleforge.FusedFFN.from_torch(plain)
            x = torch.randn(batch, length, embed, device="cuda", dtype=dtype)
            name = f"ffn {batch}x{length}x{embed}->{hidden} {precision}"
            calls = 20 if batch * length * embed * hidden < 2**36 else 4
            with torch.no_grad():
                weights = [p.double() for p in plain.parameters()]
                exact = F.linear(F.gelu(F.linear(x.double(), *weights[:2])), *weights[2:])
                _check(ours(x), exact, {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "ieee": 2e-6}[precision])
                path = styleforge.last_path()
                peaks = [_peak(partial(function, x)) for function in (ours, plain)]
                times = {"eager": graph_time([partial(plain, x)], calls_per_graph=calls)}
                if compile:
                    times["compile"] = graph_time([partial(_compiled(plain), x)], calls_per_graph=calls)
                time = graph_time([partial(ours, x)], calls_per_graph=calls)
            _line(name, time, times, f"{path}, peak {peaks[0]:.0f} MB against {peaks[1]:.0f}")
            if (batch, length, embed, hidden) in FFN_CASES[-2:] or precision == "tf32":
                continue
            leaf = x.clone().requires_grad_()
            grad = torch.randn_like(x)
            parameters = list(plain.parameters())

            def step(
                function: Callable[..., Tensor], x: Tensor = leaf, g: Tensor = grad, p: Any = parameters
            ) -> Any:
                return torch.autograd.grad(function(x), (x, *p), g)

            peaks = [_peak(partial(step, function)) for function in (ours, plain)]
            times = {"eager": graph_time([partial(step, plain)], calls_per_graph=4)}
            if compile:
                times["compile"] = graph_time([partial(step, _compiled(plain))], calls_per_graph=4)
            time = graph_time([partial(step, ours)], calls_per_graph=4)
            _line(name + " fwd+bwd", time, times, f"peak {peaks[0]:.0f} MB against {peaks[1]:.0f}")
    torch.backends.cuda.matmul.allow_tf32 = before


def _kernel_time(call: Callable[[], Any], name: str, calls: int = 5) -> float:
    """Microseconds a call spends in the kernels of that name: the operator has no way to the heads alone."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type.name == "CUDA" and name in e.name]
    return float(sum(e.device_time for e in events)) / calls


def bench_heads() -> None:
    """Attention of float32 heads against PyTorch's ``scaled_dot_product_attention`` of the same numbers."""
    for (batch, length, heads, head_dim), is_causal in itertools.product(HEADS_CASES, (False, True)):
        embed = heads * head_dim
        x = torch.randn(batch, length, embed, device="cuda")
        sizes = ((3 * embed, embed), (3 * embed,), (embed, embed), (embed,))
        parameters = [torch.randn(s, device="cuda") / embed**0.5 for s in sizes]
        call = partial(
            torch.ops.styleforge._fused_attention_forward,
            *(x, *parameters, heads, None, is_causal, None, "ieee", 2),
        )
        _, qkv, result, _ = call()
        path = styleforge.last_path()
        packed = qkv.view(batch, length, 3, heads, head_dim)
        q, k, v = packed.permute(2, 0, 3, 1, 4).contiguous()
        first = F.scaled_dot_product_attention(
            q[:1, :1].double(), k[:1, :1].double(), v[:1, :1].double(), is_causal=is_causal
        )
        _check(result.view(batch, length, heads, head_dim)[:1, :, 0], first[:, 0], 1e-6)
        theirs = graph_time(
            [partial(F.scaled_dot_product_attention, q, k, v, is_causal=is_causal)],
            repeats=5,
            calls_per_graph=2,
        )
        name = f"heads {batch}x{length}x{heads}x{head_dim} {'causal' if is_causal else ''}"
        _line(name, _kernel_time(call, "attention_kernel"), {"sdpa": theirs}, path)


def bench_net(compile: bool, cases: Sequence[tuple[int, int, int]] = ((1, 512, 512),)) -> None:
    """TransformerNet in half precision and float32 (TF32)."""
    from styleforge.models import TransformerNet

    for batch, height, width in cases:
        for dtype in (torch.float16, torch.float32):
            net = TransformerNet().cuda().to(dtype).eval()
            plain = net.to_torch().eval()
            best: Baselines = {}
            x = torch.rand(batch, 3, height, width, device="cuda", dtype=dtype) * 255
            with torch.no_grad():
                reference = plain(x)
                _check(net(x), reference, 2e-2)
                for channels_last in (False, True):
                    memory_format = torch.channels_last if channels_last else torch.contiguous_format
                    plain.to(memory_format=memory_format)  # type: ignore[call-overload]  # in place
                    xf = _formatted(x, channels_last)
                    times = {"eager": graph_time([partial(plain, xf)], calls_per_graph=3)}
                    if compile:
                        torch._dynamo.reset()
                        compiled = torch.compile(plain, fullgraph=True)
                        times["compile"] = graph_time([partial(compiled, xf)], calls_per_graph=3)
                    for key, value in times.items():
                        best[key] = min(best.get(key, value), value)
                ours = graph_time([partial(net, x)], calls_per_graph=3)
                _line(f"TransformerNet {batch}x3x{height}x{width} {str(dtype)[6:]}", ours, best)


def bench_host() -> None:
    """Host time of eager calls against ``torch.relu``; of modules also against their operator."""
    x = torch.randn(1, 64, 16, 16, device="cuda")  # channels enough for the fused convolution
    weight = torch.randn(64, device="cuda")
    conv_weight = torch.randn(64, 64, 3, 3, device="cuda")
    y, y_weight = _formatted(x, True), _formatted(conv_weight, True)
    norm = styleforge.FusedInstanceNorm2d(64).cuda()
    block = styleforge.FusedConvInstanceNormReLU(64, 64).cuda()
    plain_norm = torch.nn.InstanceNorm2d(64, affine=True).cuda()
    plain_block = torch.nn.Sequential(
        torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.InstanceNorm2d(64, affine=True), torch.nn.ReLU()
    ).cuda()
    plain_ffn = torch.nn.Sequential(
        torch.nn.Linear(128, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)
    ).cuda()
    ffn = styleforge.FusedFFN.from_torch(plain_ffn).eval()
    tokens = torch.randn(1, 256, 128, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "relu": lambda: torch.relu(x),
        "fused_instance_norm (input)": lambda: torch.ops.styleforge.fused_instance_norm(x),
        "fused_instance_norm (all)": lambda: torch.ops.styleforge.fused_instance_norm(
            x, weight, weight, 1e-5, "relu", 0.01, x
        ),
        "fused_instance_norm.default (all)": lambda: torch.ops.styleforge.fused_instance_norm.default(
            x, weight, weight, 1e-5, "relu", 0.01, x
        ),
        "fused_conv_instance_norm_relu": lambda: torch.ops.styleforge.fused_conv_instance_norm_relu(
            x, conv_weight, None, weight, weight, (1, 1), (1, 1)
        ),
        "the same, channels_last": lambda: torch.ops.styleforge.fused_conv_instance_norm_relu(
            y, y_weight, None, weight, weight, (1, 1), (1, 1)
        ),
        "conv2d": lambda: F.conv2d(x, conv_weight, None, 1, 1),
        "FusedInstanceNorm2d": lambda: norm(x),
        "nn.InstanceNorm2d": lambda: plain_norm(x),
        "FusedConvInstanceNormReLU": lambda: block(x),
        "nn.Sequential of Conv2d, norm, ReLU": lambda: plain_block(x),
        "FusedFFN": lambda: ffn(tokens),
        "nn.Sequential of Linear, GELU, Linear": lambda: plain_ffn(tokens),
    }
    w, b, k, kb, kw, ks = norm.weight, norm.bias, block.weight, block.bias, block.norm_weight, block.norm_bias
    operators: dict[str, Callable[[], Any]] = {
        "FusedInstanceNorm2d": lambda: torch.ops.styleforge.fused_instance_norm(
            x, w, b, 1e-5, "none", 0.01, None
        ),
        "FusedConvInstanceNormReLU": lambda: torch.ops.styleforge.fused_conv_instance_norm_relu(
            x, k, kb, kw, ks, (1, 1), (1, 1), "zeros", 1, 1e-5, "relu", 0.01, None, block.scripted_precision
        ),
    }
    for mode, context in (("inference_mode", torch.inference_mode), ("no_grad", torch.no_grad)):
        with context():
            base = host_time(calls["relu"])
            for name, call in calls.items():
                time = host_time(call)
                line = f"host {mode:15s} {name:36s} {time:7.2f} us  {time / base:5.2f} x relu"
                if name in operators:
                    line += f"  {time - host_time(operators[name]):+5.2f} us over the operator"
                print(line, flush=True)


def bench_backward() -> None:
    """Forward and backward of norm + ReLU, eager against styleforge."""
    for shape in [(4, 64, 256, 256), (8, 128, 64, 64)]:
        for channels_last in (False, True):
            x = _formatted(torch.randn(shape, device="cuda"), channels_last).requires_grad_()
            weight = torch.randn(shape[1], device="cuda", requires_grad=True)
            bias = torch.randn(shape[1], device="cuda", requires_grad=True)
            grad = torch.randn_like(x)

            def eager(x: Tensor = x, w: Tensor = weight, b: Tensor = bias, g: Tensor = grad) -> Any:
                return torch.autograd.grad(F.relu(F.instance_norm(x, weight=w, bias=b)), (x, w, b), g)

            def ours(x: Tensor = x, w: Tensor = weight, b: Tensor = bias, g: Tensor = grad) -> Any:
                return torch.autograd.grad(fused_instance_norm(x, w, b, activation="relu"), (x, w, b), g)

            for a, b in zip(ours(), eager(), strict=True):
                _check(a, b, 1e-4)
            name = f"norm fwd+bwd {'x'.join(map(str, shape))} {'nhwc' if channels_last else 'nchw'}"
            _line(name, graph_time([ours]), {"eager": graph_time([eager])})


def bench_cpu() -> None:
    """The CPU cases, with the threads PyTorch has (milliseconds)."""
    from styleforge.models import TransformerNet

    with torch.no_grad():
        norm = torch.nn.InstanceNorm2d(64, affine=True)
        for channels_last in (False, True):
            x = _formatted(torch.randn(4, 64, 256, 256), channels_last)

            def eager(x: Tensor = x) -> Tensor:
                return F.relu(norm(x))

            compiled = _compiled(eager)
            times = cpu_times(
                [
                    partial(fused_instance_norm, x, norm.weight, norm.bias, activation="relu"),
                    eager,
                    compiled,
                    x.clone,
                ]
            )
            name = f"cpu norm 4x64x256x256 {'nhwc' if channels_last else 'nchw'} (ms)"
            _line(name, times[0], dict(zip(("eager", "compile", "copy"), times[1:], strict=True)))
        net = TransformerNet().eval()
        plain = net.to_torch().eval()
        x = torch.rand(1, 3, 512, 512) * 255
        compiled_net = torch.compile(plain, fullgraph=True)
        times = cpu_times([lambda: net(x), lambda: plain(x), lambda: compiled_net(x)], repeats=7)
        _line(
            "cpu TransformerNet 1x3x512x512 (ms)",
            times[0],
            dict(zip(("eager", "compile"), times[1:], strict=True)),
        )


def main() -> None:
    """Runs the groups named on the command line, all GPU groups by default."""
    groups = ("norm", "conv", "ffn", "heads", "net", "host", "backward", "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "groups",
        nargs="*",
        choices=groups,
        default=["norm", "conv", "ffn", "heads", "net", "host", "backward"],
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    compile = not arguments.no_compile
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    with torch.no_grad():
        if "norm" in arguments.groups:
            bench_norm(compile)
        if "conv" in arguments.groups:
            bench_conv(compile)
    if "ffn" in arguments.groups:
        bench_ffn(compile)
    if "heads" in arguments.groups:
        bench_heads()
    if "net" in arguments.groups:
        bench_net(compile)
    if "host" in arguments.groups:
        bench_host()
    if "backward" in arguments.groups:
        bench_backward()
    if "cpu" in arguments.groups:
        bench_cpu()


if __name__ == "__main__":
    main()
