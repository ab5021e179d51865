"""Without gradients, modules call their operators past autograd; what lies around it has to see them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import styleforge
from _reference import max_error, tensor
from styleforge.ops import _common as common
from test_dispatch import Logging, Wrapper

OPERATORS = torch.ops.styleforge


def _module(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = {
        "norm": lambda: styleforge.FusedInstanceNorm2d(3, affine=True, activation="silu"),
        "conv": lambda: styleforge.FusedConvInstanceNormReLU(3, 3, 3),
        "ffn": lambda: styleforge.FusedFFN(5, 7, 0.0),
        "attention": lambda: styleforge.FusedAttention(6, 3),
    }[name]()
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return module


OVERLOADS: dict[str, Any] = {
    "norm": OPERATORS.fused_instance_norm.default,
    "conv": OPERATORS.fused_conv_instance_norm_relu.default,
    "ffn": OPERATORS.fused_ffn.default,
    "attention": OPERATORS.fused_attention.default,
}
CASES = pytest.mark.parametrize("name", OVERLOADS)


def _input(name: str) -> Tensor:
    return {"ffn": lambda: torch.randn(2, 4, 5), "attention": lambda: torch.randn(2, 4, 6)}.get(
        name, lambda: tensor(2, 3, 6, 5)
    )()


def _by_the_long_way(module: nn.Module, *args: Any, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Tensor:
    """The result where the modules are told that autograd is wanted."""
    with monkeypatch.context() as patch:
        for file in ("fused_instance_norm", "fused_conv_instance_norm_relu", "fused_ffn", "fused_attention"):
            patch.setattr(f"styleforge.nn.{file}.autograd_is_idle", lambda _: False)
        with torch.no_grad():
            result: Tensor = module(*args, **kwargs)
    return result


@CASES
def test_the_short_way_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its result is the same; autograd's kernel is only called where there is a gradient to keep."""
    module, x = _module(name), _input(name)
    expected = _by_the_long_way(module, x, monkeypatch=monkeypatch)
    entered: list[bool] = []
    real = common.BelowAutograd

    def guard() -> Any:
        entered.append(True)
        return real()

    for file in ("fused_instance_norm", "fused_conv_instance_norm_relu", "fused_ffn", "fused_attention"):
        monkeypatch.setattr(f"styleforge.nn.{file}.BelowAutograd", guard)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(module(x), expected)
    assert len(entered) == 2
    result = module(x)
    assert result.requires_grad and torch.equal(result, expected) and len(entered) == 2
    result.sum().backward()
    assert any(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_every_argument_arrives(
    activation: str, with_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are left out where they are the operator's defaults, and those that are not."""
    x = tensor(1, 4, 7, 6)
    residual = tensor(1, 4, 7, 6) if with_residual else None
    modules: list[nn.Module] = [
        styleforge.FusedInstanceNorm2d(4, 1e-2, activation=activation, negative_slope=0.3),
        styleforge.FusedConvInstanceNormReLU(
            4, 4, 3, padding_mode="reflect", activation=activation, negative_slope=0.3
        ),
        styleforge.FusedConvInstanceNormReLU(4, 4, (3, 1), padding=(1, 0), activation=activation),
        styleforge.FusedConvInstanceNormReLU(4, 4, 3, eps=0.1, activation=activation),
        styleforge.FusedConvInstanceNormReLU(4, 4, 3, precision="tf32"),
    ]
    for module in modules:
        expected = _by_the_long_way(module, x, residual, monkeypatch=monkeypatch)
        with torch.no_grad():
            assert torch.equal(module(x, residual), expected)
    wide = styleforge.FusedConvInstanceNormReLU(4, 2, 3, (2, 1), upsample=2)
    expected = _by_the_long_way(wide, x, monkeypatch=monkeypatch)
    with torch.no_grad():
        assert torch.equal(wide(x), expected)
    tokens = torch.randn(2, 5, 8)
    for kind in ("gelu", "relu"):
        ffn = styleforge.FusedFFN(8, 12, 0.0, activation=kind)
        more = tokens + 1 if with_residual else None
        expected = _by_the_long_way(ffn, tokens, more, monkeypatch=monkeypatch)
        with torch.no_grad():
            assert torch.equal(ffn(tokens, more), expected)


@pytest.mark.parametrize("version", ["auto", 1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_call_of_attention(version: Any, batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = styleforge.FusedAttention(8, 2, 0.5, version=version, batch_first=batch_first, bias=False)
    x = torch.randn(3, 4, 8)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 2:] = True
    for training in (False, True):
        attention.train(training)
        calls: list[tuple[Tensor, dict[str, Any]]] = [(x, {}), (x, {"is_causal": True}), (x[0], {})]
        if batch_first:
            calls.append((x, {"key_padding_mask": mask}))
        for tokens, options in calls:
            torch.manual_seed(1)
            expected = _by_the_long_way(attention, tokens, monkeypatch=monkeypatch, **options)
            torch.manual_seed(1)
            with torch.no_grad():
                assert torch.equal(attention(tokens, **options), expected)


@CASES
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_dispatch_mode_sees_the_operator(name: str, context: Any) -> None:
    module, x = _module(name), _input(name)
    with context(), Logging() as mode:
        result = module(x)
    assert mode.seen.count(OVERLOADS[name]) == 1 and not result.requires_grad


@CASES
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracing_records_the_operator(name: str, tracing_mode: str, pre_dispatch: bool) -> None:
    module, x = _module(name), _input(name)

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))

    with torch.no_grad():
        parameters = dict(module.named_parameters())
        graph = make_fx(
            call, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True
        )(x)
        assert [n.target for n in graph.graph.nodes].count(OVERLOADS[name]) == 1
        assert torch.equal(graph(x), module(x))


@CASES
def test_a_tensor_subclass_is_asked(name: str) -> None:
    """As the input, and as a parameter beside a plain input."""
    module, x = _module(name), _input(name)
    with torch.no_grad():
        expected = module(x)
        Wrapper.seen.clear()
        result = module(Wrapper(x))
        assert Wrapper.seen == [OVERLOADS[name]] and torch.equal(result.inner, expected)
        wrapped = {n: nn.Parameter(Wrapper(p.detach())) for n, p in module.named_parameters()}
        for prefix, child in module.named_modules():
            for own in list(child._parameters):
                child._parameters[own] = wrapped[f"{prefix}.{own}" if prefix else own]
        Wrapper.seen.clear()
        result = module(x)
        assert OVERLOADS[name] in Wrapper.seen and torch.equal(result.inner, expected)


@CASES
def test_functional_lazily_negated_and_meta_tensors(name: str) -> None:
    module, x = _module(name), _input(name)
    with torch.no_grad():
        expected = module(x)
        torch._enable_functionalization(reapply_views=True)  # type: ignore[attr-defined]
        try:
            result = module(torch._to_functional_tensor(x))  # type: ignore[attr-defined]
        finally:
            torch._disable_functionalization()  # type: ignore[attr-defined]
        assert torch.equal(torch._from_functional_tensor(result), expected)  # type: ignore[attr-defined]
        lazy = torch.complex(x, -x).conj().imag
        assert lazy.is_neg() and type(lazy) is Tensor
        assert torch.equal(module(lazy), module(lazy.resolve_neg()))
        meta = copy.deepcopy(module).to("meta")(x.to("meta"))
        assert meta.is_meta and meta.shape == expected.shape and meta.stride() == expected.stride()


@CASES
def test_transforms(name: str) -> None:
    module, x = _module(name), _input(name)
    stack = torch.stack([x, 2 * x + 1])
    with torch.no_grad():
        batched = torch.func.vmap(module)(stack)
        for one, given in zip(batched, stack, strict=True):
            assert max_error(one, module(given).double()) < 1e-5

    def loss(x: Tensor) -> Tensor:
        return (module(x) * x).sum()

    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = module(x)
        return (fixed * x).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
        torch.testing.assert_close(torch.func.grad(cut)(x), module(x))


@CASES
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(name: str, trained: bool, grad: bool) -> None:
    """A tangent that got lost would be a derivative of zero without a word."""
    module, x = _module(name).requires_grad_(trained), _input(name)
    message = f"{OVERLOADS[name].name().split('::')[1]}: forward-mode differentiation is not supported"
    with torch.set_grad_enabled(grad):
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(module, (x,), (x,))
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=message):
                module(forward_ad.make_dual(x, x))
            assert torch.equal(module(x), copy.deepcopy(module)(x))  # no tangent, nothing to lose
            with torch.inference_mode():
                module(x)


@CASES
def test_autocast(name: str) -> None:
    module, x = _module(name), _input(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = module(x)
    assert result.dtype == (torch.float32 if name == "norm" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), result)


@CASES
def test_profiled_and_scripted(name: str) -> None:
    module, x = _module(name), _input(name)
    with torch.no_grad(), torch.profiler.profile() as profiler:
        expected = module(x)
    assert any(event.name == OVERLOADS[name].name().split(".")[0] for event in profiler.events())
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert torch.equal(traced(x), expected)
        assert torch.equal(torch.jit.script(nn.Sequential(module))(x), expected)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)


@CASES
def test_an_error_leaves_autograd_as_it_was(name: str) -> None:
    """Also while somebody keeps the error with all its frames."""
    module, x = _module(name), _input(name)
    wrong: Callable[[], Any] = lambda: module(x[..., :-1] if x.dim() == 3 else x[:, :-1])  # noqa: E731
    with torch.no_grad(), pytest.raises(RuntimeError) as kept:
        wrong()
    assert kept.value.__traceback__ is not None
    leaf = x.clone().requires_grad_()
    (leaf * 2).sum().backward()
    assert leaf.grad is not None
    assert module(x).requires_grad
