"""A model as one CUDA graph: no launch costs the host anything but the replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

WARM_UP = 3  # calls before the capture: cuDNN and cuBLAS choose their kernels and make their workspaces


def capture(
    function: Callable[[], Any], warm_up: Callable[[], Any] | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Captures a call on the current device.

    Args:
        function: captured once.
        warm_up: runs three times before, on a stream of its own; ``function`` where not given.

    Returns:
        The graph and what the captured call returned.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            (warm_up or function)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Without a stream it takes that of the first graph of the process, on whichever device.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        result = function()
    return graph, result


class GraphedModel:
    """What ``styleforge.graphed`` returns: call it as the model, with tensors like the example's.

    Attributes:
        graph: the captured ``torch.cuda.CUDAGraph``.
    """

    def __init__(self, model: Callable[..., Any], example: tuple[Any, ...]) -> None:
        leaves, self._structure = tree_flatten(example)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(tensor.is_cuda for tensor in tensors):
            raise ValueError("graphed: example must hold tensors, and all of them on a CUDA device")
        if len({tensor.device for tensor in tensors}) > 1:
            raise ValueError("graphed: the example's tensors must be on one device")
        self._device = tensors[0].device
        # Copies of their own: the graph reads and writes these addresses for ever.
        self._inputs = [_copy(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = tree_unflatten(self._inputs, self._structure)
        with torch.cuda.device(self._device), torch.no_grad():
            self.graph, self._output = capture(lambda: model(*arguments))
            self._stream = torch.cuda.current_stream()
        # The graph does not keep what it reads alive, nor does the model once it is given other tensors.
        self._model = model
        self._read: list[Tensor] = []
        if isinstance(model, torch.nn.Module):
            self._read = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]

    def __call__(self, *args: Any) -> Any:
        """The model's result for ``args``, in tensors that the next call overwrites.

        Raises:
            ValueError: an argument's shape, dtype, device or value is not the example's.
        """
        leaves, structure = tree_flatten(args)
        if structure != self._structure:
            raise ValueError(f"graphed: expected arguments like {self._structure}, got {structure}")
        with torch.cuda.device(self._device), torch.no_grad():
            stream = torch.cuda.current_stream()
            if stream != self._stream:  # where the call before may still read what this one overwrites
                stream.wait_stream(self._stream)
                self._stream = stream
            for index, (held, given) in enumerate(zip(self._inputs, leaves, strict=True)):
                if not isinstance(held, Tensor):
                    if given is not held and given != held:
                        raise ValueError(f"graphed: argument {index} was captured as {held!r}, got {given!r}")
                    continue
                _check_like(index, held, given)
                held.copy_(given, non_blocking=True)
            self.graph.replay()
        return tree_map(lambda result: result, self._output)


def graphed(model: Callable[..., Any], example: Any) -> GraphedModel:
    """Captures ``model`` in a CUDA graph, for inference with one shape.

    A replay costs the host a few microseconds whatever the number of layers; the parameters are read at each
    replay, so in-place changes of them count; after those that give the model other tensors (``half``,
    ``load_state_dict(assign=True)``) it has to be captured again. Nothing in the model may wait for the GPU
    or depend on values.

    Args:
        model: a module in eval mode, or a function.
        example: a CUDA tensor, or a tuple of arguments (tensors, also nested, and plain values).

    Returns:
        A callable with the model's arguments: tensors of the example's shapes, dtypes and device. The next
        call overwrites its results: ``clone`` what has to last.

    Raises:
        ValueError: the example has no CUDA tensor, or tensors of several devices; the model is in training
            mode.

    Example:
        >>> fast = styleforge.graphed(model.eval().half().cuda(), torch.rand(1, 3, 512, 512).half().cuda())
        >>> picture = fast(frame).clone()
    """
    if isinstance(model, torch.nn.Module) and model.training:
        raise ValueError("graphed: the model is in training mode; call model.eval() first")
    return GraphedModel(model, example if isinstance(example, tuple) else (example,))


def _copy(tensor: Tensor) -> Tensor:
    """A copy that may be written to for ever: no inference tensor, to which only inference mode may."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def _check_like(index: int, held: Tensor, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"graphed: argument {index} must be a tensor, got {type(given).__name__}")
    for what, wanted, found in (
        ("shape", list(held.shape), list(given.shape)),
        ("dtype", held.dtype, given.dtype),
        ("device", held.device, given.device),
    ):
        if wanted != found:
            raise ValueError(f"graphed: argument {index} was captured with {what} {wanted}, got {found}")
