"""Under ``no_grad`` a call goes straight on below autograd: whatever lies in between still has to see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import styleforge
from _reference import conv_instance_norm, ffn, instance_norm, max_error, tensor
from styleforge.ops import _common as common

NORM = torch.ops.styleforge.fused_instance_norm
CONV = torch.ops.styleforge.fused_conv_instance_norm_relu
FFN = torch.ops.styleforge.fused_ffn
ATTENTION = torch.ops.styleforge.fused_attention


class Logging(TorchDispatchMode):
    """Writes down every operator it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Wrapper(Tensor):
    """A tensor around another one, which counts the operators that reach it."""

    inner: Tensor
    seen: list[Any] = []  # noqa: RUF012 (one list for all of them)

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        outer: Wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        args = [a.inner if isinstance(a, Wrapper) else a for a in args]
        return cls(func(*args, **(kwargs or {})))


def _norm(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return NORM(x, w, w, 1e-5, "silu", 0.01, r)


def _conv(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, 3, 3, device=x.device) / 9
    return CONV(x, kernel, None, w, w, (1, 1), (1, 1), "reflect", 1, 1e-5, "silu", 0.01, r)


def _ffn(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    fc1, fc2 = (torch.ones(s, device=x.device) / 4 for s in ((3, 5), (5, 3)))
    return FFN(x, fc1, w, fc2, None, "silu", r)


def _attention(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    """w is the last bias, r the last weight."""
    return ATTENTION(x, torch.ones(15, 5, device=x.device) / 4, None, r, w, 5, None, True)


CALLS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "norm": (_norm, NORM.default),
    "conv": (_conv, CONV.default),
    "ffn": (_ffn, FFN.default),
    "attention": (_attention, ATTENTION.default),
}
CASES = pytest.mark.parametrize("operator", CALLS)


def _arguments(operator: str) -> tuple[Tensor, Tensor, Tensor]:
    """Input, a parameter, and a tensor that can be multiplied with the result."""
    if operator == "attention":
        return torch.randn(2, 5, 5), torch.rand(5), torch.randn(5, 5)
    return tensor(2, 3, 6, 5), torch.rand(3) + 0.5, tensor(2, 3, 6, 5)


@CASES
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_dispatch_mode_sees_the_operator(operator: str, context: Any, requires_grad: bool) -> None:
    call, overload = CALLS[operator]
    x, w, r = _arguments(operator)
    expected = call(x, w, r)
    x.requires_grad_(requires_grad)
    with context(), Logging() as mode:
        result = call(x, w, r)
    assert mode.seen.count(overload) == 1
    assert torch.equal(result, expected) and not result.requires_grad


@CASES
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracing_records_the_operator(operator: str, tracing_mode: str, pre_dispatch: bool) -> None:
    call, overload = CALLS[operator]
    arguments = _arguments(operator)
    with torch.no_grad():
        graph = make_fx(call, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*arguments)
        assert [n.target for n in graph.graph.nodes].count(overload) == 1
        assert torch.equal(graph(*arguments), call(*arguments))


@CASES
@pytest.mark.parametrize("wrapped", range(3))
def test_a_tensor_subclass_is_asked(operator: str, wrapped: int) -> None:
    """Whichever argument is one: the input, a parameter or the residual (of attention: two parameters)."""
    call, overload = CALLS[operator]
    arguments = list(_arguments(operator))
    expected = call(*arguments)
    arguments[wrapped] = Wrapper(arguments[wrapped])
    Wrapper.seen.clear()
    with torch.no_grad():
        result = call(*arguments)
    assert Wrapper.seen == [overload]
    assert isinstance(result, Wrapper) and torch.equal(result.inner, expected)


@CASES
def test_functionalization_and_functional_tensors(operator: str) -> None:
    call, overload = CALLS[operator]
    arguments = _arguments(operator)
    expected = call(*arguments)
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(call))(*arguments)
        assert [n.target for n in graph.graph.nodes].count(overload) == 1
        assert torch.equal(graph(*arguments), expected)
        wrapped = [torch._to_functional_tensor(a) for a in arguments]  # type: ignore[attr-defined]
        torch._enable_functionalization(reapply_views=True)  # type: ignore[attr-defined]
        try:
            result = call(*wrapped)
        finally:
            torch._disable_functionalization()  # type: ignore[attr-defined]
        assert torch._is_functional_tensor(result)  # type: ignore[attr-defined]
        assert torch.equal(torch._from_functional_tensor(result), expected)  # type: ignore[attr-defined]


@CASES
def test_lazily_negated_tensors(operator: str) -> None:
    """The imaginary part of a lazy conjugate is a plain tensor whose values have to be negated first."""
    call, _ = CALLS[operator]
    x, w, r = _arguments(operator)
    for position, plain in ((0, x), (2, r)):
        lazy = torch.complex(plain, -plain).conj().imag
        assert lazy.is_neg() and type(lazy) is Tensor
        arguments, resolved = [x, w, r], [x, w, r]
        arguments[position], resolved[position] = lazy, lazy.resolve_neg()
        with torch.no_grad():
            assert torch.equal(call(*arguments), call(*resolved))


@CASES
def test_meta_tensors(operator: str) -> None:
    call, _ = CALLS[operator]
    arguments = _arguments(operator)
    with torch.no_grad():
        expected = call(*arguments)
        result = call(*(a.to("meta") for a in arguments))
        assert result.is_meta and result.shape == expected.shape and result.stride() == expected.stride()


@CASES
def test_transforms_with_no_grad_inside_and_outside(operator: str) -> None:
    call, _ = CALLS[operator]
    x, w, r = _arguments(operator)
    stack = torch.stack([x, 2 * x + 1])
    with torch.no_grad():
        batched = torch.func.vmap(call, in_dims=(0, None, None))(stack, w, r)
        for one, given in zip(batched, stack, strict=True):
            assert max_error(one, call(given, w, r).double()) < 1e-5

    def loss(x: Tensor) -> Tensor:
        return (call(x, w, r) * r).sum()

    def cut(x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = call(x, w, r)
        return (fixed * x).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    with torch.no_grad():  # as with PyTorch's own operators, the transform counts, not the mode outside
        torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    torch.testing.assert_close(torch.func.grad(cut)(x), call(x, w, r))


@CASES
def test_torch_jit_trace_records_the_operator(operator: str) -> None:
    call, overload = CALLS[operator]
    arguments = _arguments(operator)
    with torch.no_grad():
        traced = torch.jit.trace(call, arguments)
    assert str(traced.graph).count(overload.name().split(".")[0]) == 1
    assert torch.equal(traced(*arguments), call(*arguments))


def test_defaults_are_the_schemas() -> None:
    """The kernel below autograd gets every argument by name: left out ones as the schema has them."""
    x = tensor(2, 3, 6, 5)
    with torch.no_grad():
        assert max_error(NORM(x), instance_norm(x)) < 1e-5
        kernel = torch.ones(2, 3, 3, 3) / 9
        assert max_error(CONV(x, kernel), conv_instance_norm(x, kernel)) < 1e-4
        weights = torch.ones(7, 5) / 5, torch.ones(4, 7) / 7
        given = (weights[0], None, weights[1], None)
        assert max_error(FFN(x, *given), ffn(x, *given)) < 1e-5
        assert torch.equal(NORM(x, activation="leaky_relu"), NORM(x, None, None, 1e-5, "leaky_relu", 0.01))


def test_keysets_below_autograd() -> None:
    """The table holds what the arithmetic gives, and nothing of autograd."""
    key = torch._C.DispatchKey
    for device in (key.CPU, key.CUDA, key.Meta):
        keyset = torch._C.DispatchKeySet(device) | torch._C.DispatchKeySet(key.AutogradFunctionality)
        keyset = keyset | torch._C.DispatchKeySet(key.Python)
        below = common.below_autograd[keyset.raw_repr()]
        assert below == keyset & torch._C._after_autograd_keyset
        assert below.has(key.Python) and below.highestPriorityTypeId() == key.Python
        assert not below.has(key.AutogradFunctionality)


# --- the modules, which take their parameters from where nn.Module keeps them ---------------------


def _modules() -> list[torch.nn.Module]:
    return [styleforge.FusedInstanceNorm2d(3), styleforge.FusedConvInstanceNormReLU(3, 3)]


def test_modules_with_other_parameters_for_one_call() -> None:
    x = tensor(1, 3, 6, 5)
    for module in _modules():
        given = {name: torch.rand_like(p) for name, p in module.named_parameters()}
        result = torch.func.functional_call(module, given, (x,))
        module.load_state_dict(given)
        assert torch.equal(result, module(x))


def test_modules_with_parametrized_and_replaced_parameters() -> None:
    class Double(torch.nn.Module):
        def forward(self, p: Tensor) -> Tensor:
            return 2 * p

    x = tensor(1, 3, 6, 5)
    for module in _modules():
        with torch.no_grad():
            expected = module(x)
            weight = module.weight
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Double())
            module.parametrizations.weight.original.mul_(0.5)
            torch.testing.assert_close(module(x), expected)
            compiled = torch.compile(module, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), expected)
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            torch.testing.assert_close(module(x), expected)
            del module.weight  # as wrappers do that keep the parameters elsewhere
            module.weight = weight * 1.0
            torch.testing.assert_close(module(x), expected)


def test_the_convolution_is_traced_symbolically_with_its_parameters() -> None:
    network = torch.nn.Sequential(styleforge.FusedConvInstanceNormReLU(3, 3))
    x = tensor(1, 3, 6, 5)
    traced = torch.fx.symbolic_trace(network)
    assert {n.target for n in traced.graph.nodes if n.op == "get_attr"} == {
        "0.weight",
        "0.bias",
        "0.norm_weight",
        "0.norm_bias",
    }
    assert torch.equal(traced(x), network(x))
