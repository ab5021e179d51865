"""Modules under ``torch.fx.symbolic_trace``."""

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy


def is_symbolic(input: Any) -> bool:
    """Whether ``input`` stands for a tensor of which nothing is known, its rank included."""
    return type(input) is not Tensor and isinstance(input, Proxy)


def call_in_graph(module: nn.Module, input: Any, *args: Any) -> Any:
    """Writes the call of ``module`` down as one node, as fx does with PyTorch's own layers."""
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *args), {})
