"""What the operators' Python sides share: memory formats, argument checks for fakes, registration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "sigmoid", "tanh")
FFN_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
PADDING_MODES = ("zeros", "reflect", "replicate")
PRECISIONS = ("ieee", "tf32")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# One handle for all Python registrations; it must live as long as the process.
_library = torch.library.Library("styleforge", "IMPL")


def register_kernel(name: str, key: str, kernel: Callable[..., Any], *, with_keyset: bool = False) -> None:
    """Registers a Python kernel of ``styleforge::name`` for a dispatch key."""
    _library.impl(name, kernel, key, with_keyset=with_keyset)


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Of means, reciprocal deviations and the softmax's logsumexp of an input."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


class _BelowAutograd(dict[int, Any]):
    """From a dispatch keyset, in raw form, to that of the kernels below autograd.

    There are a handful of keysets in a program; looking one up takes half as long as working it out.
    """

    def __missing__(self, raw: int) -> Any:
        keyset = torch._C.DispatchKeySet.from_raw_repr(raw) & torch._C._after_autograd_keyset
        self[raw] = keyset
        return keyset


below_autograd = _BelowAutograd()


# While an object of this type lives, calls go past autograd's kernels.
# (As a context manager it takes twice the time.)
BelowAutograd = torch._C._AutoDispatchBelowAutograd
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing


def autograd_is_idle(input: Tensor) -> bool:
    """Whether autograd's kernel would find nothing to do, so that a module may call its operator past it.

    That kernel is in Python, which takes the host more time than the rest of a call. All other dispatch keys
    see the call as ever. Not where somebody looks on: modes and subclasses of tensors, who may want gradients
    after all, TorchScript's tracing, which notes where a call stands, and dynamo, which knows no such guard;
    nor inside of forward-mode differentiation, which no_grad does not switch off.
    """
    if _is_dynamo_compiling() or _is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    return type(input) is Tensor and not _dispatch_modes() and not _is_tracing()


def prefers_channels_last(input: Tensor) -> bool:
    """Whether an operator on this [N, C, H, W] tensor gives a channels_last result.

    The rule of c10/core/MemoryFormat.h (``is_channels_last_strides_2d``), as the C++ side has it in
    ``ops/checks.cpp``.
    """
    if input.dim() != 4:
        return False
    sizes, strides = input.shape, input.stride()
    least: Any = 0
    if strides[1] == 0:
        return False
    for d in (1, 3, 2, 0):
        if sizes[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d]
        if sizes[d] > 1:
            least = least * sizes[d]
    return True


def empty_like_format(input: Tensor, sizes: Sequence[Any], channels_last: bool) -> Tensor:
    """An uninitialised tensor of ``sizes`` in one of the dense formats, with the input's dtype and device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(sizes), dtype=input.dtype, device=input.device, memory_format=memory_format)


def in_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """The values in one of the dense formats, with its strides also in dimensions of one element or none."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dense = tensor.contiguous(memory_format=memory_format)
    if all(size > 1 for size in dense.shape):
        return dense
    strides = torch.empty(dense.shape, device="meta", memory_format=memory_format).stride()
    return dense if dense.stride() == strides else dense.as_strided(dense.shape, strides)


def check(op: str, condition: Any, message: Callable[[], str]) -> None:
    """``torch._check`` with the operator's name in front, worded as the C++ checks."""
    torch._check(condition, lambda: f"{op}: {message()}")


def check_choice(op: str, argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RuntimeError(f'{op}: {argument} must be one of {", ".join(choices)}, got "{value}"')


def check_input(op: str, input: Tensor) -> None:
    check(op, input.dim() == 4, lambda: f"input must have shape [N, C, H, W], got {list(input.shape)}")
    check_dtype(op, "input", input)


def check_dtype(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise RuntimeError(
            f"{op}: {argument} must be float32, float16, bfloat16 or float64, got {_name(tensor.dtype)}"
        )


def check_norm_params(
    op: str, weight: tuple[str, Tensor | None], bias: tuple[str, Tensor | None], input: Tensor, channels: Any
) -> None:
    """(name, tensor) of scale and shift: [C] or [N, C], of the input's dtype or float32, both alike."""
    for name, param in (weight, bias):
        if param is None:
            continue
        check_device(op, name, param, input)
        if param.dtype not in (input.dtype, torch.float32):
            other = "" if input.dtype == torch.float32 else " (the dtype of input) or float32"
            raise RuntimeError(f"{op}: {name} must be {_name(input.dtype)}{other}, got {_name(param.dtype)}")
        batch = input.shape[0]
        expected = (batch, channels) if param.dim() == 2 else (channels,)
        fits = param.dim() in (1, 2) and all(a == b for a, b in zip(param.shape, expected, strict=False))
        if not fits:
            raise RuntimeError(
                f"{op}: {name} must have shape [{channels}] or [{batch}, {channels}], got {list(param.shape)}"
            )
    if weight[1] is None or bias[1] is None:
        return
    names = f"{weight[0]} and {bias[0]}"
    if weight[1].dim() != bias[1].dim():
        raise RuntimeError(
            f"{op}: {names} must have the same shape, got {list(weight[1].shape)} and {list(bias[1].shape)}"
        )
    if weight[1].dtype != bias[1].dtype:
        raise RuntimeError(
            f"{op}: {names} must have the same dtype, got {_name(weight[1].dtype)} and {_name(bias[1].dtype)}"
        )


def check_like(op: str, argument: str, tensor: Tensor | None, input: Tensor, sizes: Sequence[Any]) -> None:
    """Device and dtype of ``input``, and these sizes."""
    if tensor is None:
        return
    check_device(op, argument, tensor, input)
    if tensor.dtype != input.dtype:
        raise RuntimeError(
            f"{op}: {argument} must have the dtype of input, {_name(input.dtype)}, got {_name(tensor.dtype)}"
        )
    check(
        op,
        tensor.dim() == len(sizes) and all(a == b for a, b in zip(tensor.shape, sizes, strict=False)),
        lambda: f"{argument} must have shape {list(sizes)}, got {list(tensor.shape)}",
    )


def check_pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    """One or two integers, each at least ``least``."""
    values = [value] if isinstance(value, int) else list(value)
    if len(values) not in (1, 2) or any(v < least for v in values):
        raise RuntimeError(f"{op}: {argument} must be one or two integers >= {least}, got {values}")
    return pair(value)


def check_device(op: str, argument: str, tensor: Tensor, input: Tensor) -> None:
    """Device of ``input``."""
    if tensor.device != input.device:
        raise RuntimeError(
            f"{op}: {argument} must be on the device of input, {input.device}, got {tensor.device}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def register_autocast(name: str, kernel: Callable[..., Any]) -> None:
    """Registers a Python kernel that runs while autocast is on, for both devices."""
    for key in ("AutocastCPU", "AutocastCUDA"):
        register_kernel(name, key, kernel)


def no_autocast(input: Tensor) -> Any:
    """Context in which the same operator can be called from its own autocast kernel."""
    key = torch._C.DispatchKey.AutocastCUDA if input.is_cuda else torch._C.DispatchKey.AutocastCPU
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))


def autocast_dtype(input: Tensor) -> torch.dtype:
    """What autocast computes in for this tensor; float64 stays as it is, as in PyTorch."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return input.dtype
    return torch.get_autocast_dtype(input.device.type)


def norm_params_for(
    dtype: torch.dtype, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Norm parameters for an input of ``dtype``: as they are if the operator takes them, else in float32."""
    params = [p for p in (weight, bias) if p is not None]
    fits = all(p.dtype in (dtype, torch.float32) for p in params) and len({p.dtype for p in params}) <= 1
    if fits:
        return weight, bias
    return (
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
    )


def pair(value: int | Tensor | Sequence[int | Tensor]) -> tuple[int, int]:
    """One or two integers as two; anything else is returned as it is, for the operator to refuse."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Tensor) and value.dim() == 0:
        return _integer(value), _integer(value)
    if len(value) == 1:
        return _integer(value[0]), _integer(value[0])
    return tuple(_integer(v) for v in value)  # type: ignore[return-value]


def _integer(value: int | Tensor) -> int:
    # Under torch.jit.trace, what follows from a tensor's size comes as a 0-d tensor; a SymInt stays symbolic.
    return int(value) if isinstance(value, Tensor) else value


def fold(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """[.., size, .., N, ...] with the vmapped dimension at ``dim`` (None: not vmapped) as [size * N, ...]."""
    if tensor is None:
        return None
    moved = to_front(tensor, dim, size)
    assert moved is not None
    return moved.reshape(size * batch, *moved.shape[2:])


def fold_param(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """A [C] or [N, C] parameter, vmapped or not, as [size * N, C]."""
    if tensor is None:
        return None
    moved = tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)
    if moved.dim() == 2:
        moved = moved[:, None].expand(size, batch, moved.shape[-1])
    return moved.reshape(size * batch, moved.shape[-1])


def to_front(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The vmapped dimension, or a broadcast one where there is none, as one more leading dimension."""
    if tensor is None:
        return None
    return tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)


def loop_over_slices(
    op: Callable[..., Any], size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Tensor, ...]:
    """A vmapped call as one call for each slice; the results stacked."""

    def slice_of(tensor: Any, dim: int | None, index: int) -> Any:
        return tensor if dim is None else tensor.select(dim, index)

    slices = [op(*(slice_of(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(size)]
    return tuple(torch.stack(results) for results in zip(*slices, strict=True))


def refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Raises NotImplementedError if an argument carries a tangent, which the operator would lose.

    Called where ``forward_ad._current_level`` says that there may be some: looking at each takes time.
    """
    if not torch._C._is_fwd_grad_enabled():
        return
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"{op}: forward-mode differentiation is not supported")


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` from inside an operator's autograd kernel, also under ``torch.func`` transforms.

    There the dispatcher has peeled the transforms off down to one level; ``apply`` itself would start over.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    with torch._functorch.utils.enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _as_leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach()
    leaf.requires_grad = True  # requires_grad_() is refused inside of torch.func's transforms
    return leaf


def first_order(op: str) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., Any]]:
    """Decorates an ``autograd.Function``'s ``backward``: differentiating that fails with a clear message.

    As ``torch.autograd.function.once_differentiable``, whose message names no operator, and which lets a
    gradient of what was saved get lost where ``grad_output`` itself needs none.
    """

    def decorate(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
            with torch.no_grad():
                result = backward(ctx, *grads)
            if not _is_grad_enabled():
                return result
            if not any(t is not None and t.requires_grad for t in (*grads, *ctx.saved_tensors)):
                return result
            message = f"{op}: double backward is not supported"
            refuse: Any = torch._C._functions.DelayedError(message.encode(), len(result))
            return refuse(*(None if g is None else _as_leaf(g) for g in result))

        return wrapper

    return decorate


class FirstOrderFunction(torch.autograd.Function):
    """A backward operator as a function of its own: differentiating it again fails with a clear message.

    ``once_differentiable`` only sees a gradient that needs one; that of a gradient penalty does not.
    Subclasses give ``forward(name, *args)``; ``name`` is the operator that the message speaks of.
    """

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: double backward is not supported")
