"""``FusedFFN``: the feed-forward network of a transformer block as one module."""

import math
from typing import Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from styleforge.nn._checks import check_choice
from styleforge.ops import matmul_precision
from styleforge.ops._common import FFN_ACTIVATIONS, PRECISIONS, BelowAutograd, autograd_is_idle
from styleforge.ops._composite import ffn_activate
from styleforge.ops._precision import matmuls_of_module, precision_of_products

_fused_ffn = torch.ops.styleforge.fused_ffn.default._op


class FusedFFN(nn.Module):
    """``dropout(fc2(dropout(activation(fc1(input))))) + residual``; one operator wherever nothing is dropped.

    See ``styleforge.ops.fused_ffn``. Dropout is that of a standard transformer block
    (``nn.TransformerEncoderLayer``, ViT): after the activation and after the second linear layer, in training
    only, from PyTorch's own generator, so that the same seed gives what the same layers give without fusion.
    In evaluation, and with a probability of 0, it is exactly the identity, and the whole is one operator
    call; a training step that drops runs on PyTorch's operators, since the mask lies between the two
    products.

    Args:
        embed_dim: width of the input, and of the output.
        hidden_dim: width between the two linear layers.
        dropout: probability of either dropout, from 0 to 1.
        bias: whether the linear layers have one.
        activation: gelu (erf), gelu_tanh, relu or silu.
        precision: of float32 on the GPU: "ieee", "tf32", or None: what ``torch.backends.cuda.matmul`` says at
            every call (a scripted module keeps what it said when the module was built).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        fc1_weight: [hidden_dim, embed_dim].
        fc1_bias: [hidden_dim] or None.
        fc2_weight: [embed_dim, hidden_dim].
        fc2_bias: [embed_dim] or None.
        hidden_dropout: probability of the dropout after the activation.
        output_dropout: probability of the dropout after the second linear layer.

    Shape:
        input [..., embed_dim]; residual and output the same.

    Raises:
        ValueError: a constructor argument is not one of those above.
        RuntimeError: from the operator, when the input does not fit.
    """

    __constants__ = ["activation", "hidden_dropout", "output_dropout", "scripted_precision"]
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        dropout: float = 0.1,
        bias: bool = True,
        activation: str = "gelu",
        *,
        precision: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, FFN_ACTIVATIONS)
        if precision is not None:
            check_choice("precision", precision, PRECISIONS)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout}")
        self.embed_dim = embed_dim
        self.hidden_dim = hidden_dim
        self.hidden_dropout = float(dropout)
        self.output_dropout = float(dropout)
        self.activation = activation
        self.precision = precision
        self.scripted_precision = matmul_precision(precision)

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.fc1_weight = parameter(hidden_dim, embed_dim)
        self.register_parameter("fc1_bias", parameter(hidden_dim) if bias else None)
        self.fc2_weight = parameter(embed_dim, hidden_dim)
        self.register_parameter("fc2_bias", parameter(embed_dim) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and biases as two ``nn.Linear`` draw them, one after the other."""
        for weight, bias in ((self.fc1_weight, self.fc1_bias), (self.fc2_weight, self.fc2_bias)):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            if bias is not None:
                bound = 1 / math.sqrt(weight.shape[1]) if weight.shape[1] > 0 else 0.0
                nn.init.uniform_(bias, -bound, bound)

    @classmethod
    def from_torch(
        cls,
        layers: Union[nn.Sequential, tuple[nn.Linear, nn.Linear], nn.TransformerEncoderLayer],
        activation: str | None = None,
        dropout: float | None = None,
        *,
        precision: str | None = None,
    ) -> "FusedFFN":
        """The fused form of existing layers, sharing their parameters.

        Args:
            layers: an ``nn.Sequential`` of Linear, activation, (Dropout,) Linear, (Dropout); an
                ``nn.TransformerEncoderLayer``, of which the feed-forward part is taken; or the two linear
                layers.
            activation: between two linear layers that are given as such, "gelu" where it is left out; the
                other forms bring theirs along.
            dropout: likewise, 0 where it is left out.
            precision: as in the constructor.

        Raises:
            TypeError: a layer of another class is given.
            ValueError: the layers have something that the fused module does not.
        """
        fc1, fc2, found, drops = _parts(layers)
        if found is not None and (activation is not None or dropout is not None):
            raise ValueError(
                f"activation and dropout must be left out where {type(layers).__name__} brings them along, "
                f"got {activation!r} and {dropout!r}"
            )
        new = cls(
            fc1.in_features,
            fc1.out_features,
            0.0,
            fc1.bias is not None,
            activation or found or "gelu",
            precision=precision,
            device="meta",
        )
        if fc2.in_features != fc1.out_features:
            raise ValueError(
                f"fc2 must take fc1's {fc1.out_features} features, got one that takes {fc2.in_features}"
            )
        if fc2.out_features != fc1.in_features:
            raise ValueError(
                f"fc2 must lead back to fc1's {fc1.in_features} features, got one with {fc2.out_features}"
            )
        if dropout is not None:
            drops = (dropout, dropout)
        new.hidden_dropout, new.output_dropout = drops
        new.fc1_weight, new.fc1_bias = fc1.weight, fc1.bias
        new.fc2_weight, new.fc2_bias = fc2.weight, fc2.bias
        return new.train(fc1.training)

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        """Input and residual [..., embed_dim] to the same shape."""
        if self.training and (self.hidden_dropout > 0.0 or self.output_dropout > 0.0):
            return self._forward_with_dropout(input, residual)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            scripted: Tensor = torch.ops.styleforge.fused_ffn(
                input,
                self.fc1_weight,
                self.fc1_bias,
                self.fc2_weight,
                self.fc2_bias,
                self.activation,
                residual,
                self.scripted_precision,
            )
            return scripted
        inferred = _infer(self, input, residual)
        if inferred is not None:
            return inferred
        precision = matmul_precision(self.precision)
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = self._tensors()
        with matmuls_of_module(input, precision):
            output: Tensor = torch.ops.styleforge.fused_ffn(
                input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, self.activation, residual, precision
            )
        return output

    def _forward_with_dropout(self, input: Tensor, residual: Optional[Tensor]) -> Tensor:
        hidden = ffn_activate(F.linear(input, self.fc1_weight, self.fc1_bias), self.activation)
        hidden = F.dropout(hidden, self.hidden_dropout)
        output = F.dropout(F.linear(hidden, self.fc2_weight, self.fc2_bias), self.output_dropout)
        if residual is not None:
            output = output + residual
        return output

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        # nn.Module finds a parameter only after it has looked everywhere else for an attribute of that name.
        parameters = self._parameters
        try:
            fc1_weight, fc1_bias = parameters["fc1_weight"], parameters["fc1_bias"]
            fc2_weight, fc2_bias = parameters["fc2_weight"], parameters["fc2_bias"]
        except KeyError:  # a parametrization or a wrapper keeps them elsewhere
            return self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        assert fc1_weight is not None and fc2_weight is not None
        return fc1_weight, fc1_bias, fc2_weight, fc2_bias

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"{self.embed_dim}, {self.hidden_dim}, dropout={self.hidden_dropout}"
        if self.output_dropout != self.hidden_dropout:
            text += f" and {self.output_dropout}"
        if self.fc1_bias is None and self.fc2_bias is None:
            text += ", bias=False"
        return f"{text}, activation={self.activation}"


def _infer(module: FusedFFN, input: Tensor, residual: Tensor | None) -> Tensor | None:
    """The operator by the shortest way, for a call without gradients; None for any other."""
    if not autograd_is_idle(input):
        return None
    own = module.__dict__  # attributes of an nn.Module take three times as long
    precision = precision_of_products(own["precision"], input)
    if precision is None:
        return None  # PyTorch's own products are to be told
    parameters = own["_parameters"]
    try:
        fc1_weight, fc1_bias = parameters["fc1_weight"], parameters["fc1_bias"]
        fc2_weight, fc2_bias = parameters["fc2_weight"], parameters["fc2_bias"]
    except KeyError:  # a parametrization or a wrapper keeps them elsewhere
        return None
    activation = own["activation"]
    guard = BelowAutograd()
    try:
        if residual is not None or precision != "ieee":
            rest = (activation, residual, precision)
            output: Tensor = _fused_ffn(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *rest)
        elif activation == "gelu":  # the operator's defaults, which take no conversion
            output = _fused_ffn(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        else:
            output = _fused_ffn(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
        return output
    finally:
        del guard


def _activation_of(layer: Any) -> str | None:
    """The operator's name of an activation layer or function; None for one that it does not have."""
    if isinstance(layer, nn.GELU):
        return "gelu" if layer.approximate == "none" else "gelu_tanh"
    if isinstance(layer, nn.ReLU) or layer in (F.relu, torch.relu):
        return "relu"
    if isinstance(layer, nn.SiLU) or layer is F.silu:
        return "silu"
    return "gelu" if layer is F.gelu else None


def _parts(
    layers: Any,
) -> tuple[nn.Linear, nn.Linear, str | None, tuple[float, float]]:
    """fc1, fc2, the activation (None: not said), and the probabilities of the two dropouts."""
    if isinstance(layers, nn.TransformerEncoderLayer):
        activation = _activation_of(layers.activation)
        if activation is None:
            raise ValueError(
                f"activation must be one of {', '.join(FFN_ACTIVATIONS)}, got {layers.activation!r}"
            )
        return layers.linear1, layers.linear2, activation, (layers.dropout.p, layers.dropout2.p)
    expected = "Linear, activation, (Dropout,) Linear, (Dropout)"
    if not hasattr(layers, "__iter__"):
        raise TypeError(
            f"layers must be two linear layers, nn.Sequential of {expected}, or nn.TransformerEncoderLayer, "
            f"got {type(layers).__name__}"
        )
    names = ", ".join(type(m).__name__ for m in layers)
    if not isinstance(layers, nn.Sequential):
        if len(layers) != 2 or not all(isinstance(m, nn.Linear) for m in layers):
            raise ValueError(f"layers must be two linear layers, or nn.Sequential of {expected}, got {names}")
        return (*layers, None, (0.0, 0.0))

    message = f"layers must be {expected}, got {names}"
    rest = list(layers)
    linears: list[nn.Linear] = []
    drops: list[float] = []
    activation = None
    for index in range(2):
        if not rest or not isinstance(rest[0], nn.Linear):
            raise ValueError(message)
        linears.append(rest.pop(0))  # type: ignore[arg-type]
        if index == 0:
            activation = _activation_of(rest.pop(0)) if rest else None
            if activation is None:
                raise ValueError(message)
        dropout = rest.pop(0) if rest and isinstance(rest[0], nn.Dropout) else None
        drops.append(dropout.p if isinstance(dropout, nn.Dropout) else 0.0)
    if rest:
        raise ValueError(message)
    return linears[0], linears[1], activation, (drops[0], drops[1])
