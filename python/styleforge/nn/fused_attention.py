# ruff: noqa: D102, F811 (forward is overloaded; TorchScript reads the comments on its lines)
"""``FusedAttention``: multi-head attention as one module, in the place of ``nn.MultiheadAttention``."""

from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from styleforge.nn._checks import check_choice, check_type
from styleforge.nn._symbolic import call_in_graph, is_symbolic
from styleforge.ops import matmul_precision
from styleforge.ops._common import PRECISIONS, BelowAutograd, autograd_is_idle
from styleforge.ops._precision import matmuls_of_module, precision_of_products
from styleforge.ops.fused_attention import MAX_HEAD_DIM, VERSIONS

_DESIGNS: dict[Union[str, int], int] = {"auto": 0, 1: 1, 2: 2}
# By design; without the Python around them that knows overloads.
_OPERATORS = tuple(getattr(torch.ops.styleforge, name).default._op for name in VERSIONS)
_is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]
_AttentionAndWeights = tuple[Tensor, Optional[Tensor]]


class FusedAttention(nn.Module):
    """Multi-head attention with its projections; one operator for self-attention that asks for no weights.

    ``attn(x)`` gives the result alone. With key and value it is called as ``nn.MultiheadAttention`` is and,
    like that, gives a pair: the result, and the attention weights or None. Its parameters have the same names
    and start from the same values.

    The operator (see ``styleforge.ops.fused_attention``) runs where query, key and value are one tensor, no
    weights are asked for, no dropout is to be applied, the key padding mask is of bool, and any other mask
    is causal (``is_causal=True``). Everything else, cross-attention above all, is computed by PyTorch, as
    ``nn.MultiheadAttention`` would.

    Args:
        embed_dim: width of the input, and of the output.
        num_heads: divides embed_dim; a head is at most 256 wide.
        dropout: probability with which attention weights are dropped in training.
        bias: whether the projections have one.
        version: the operator's design: 1 for short sequences, 2 for any length, "auto" chooses by length.
        batch_first: whether the batch is the first dimension, [N, S, E], or the second one, [S, N, E].
        precision: of float32 on the GPU: "ieee", "tf32", or None: what ``torch.backends.cuda.matmul`` says at
            every call (a scripted module keeps what it said when the module was built).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        in_proj_weight: [3 * embed_dim, embed_dim], queries, keys and values one below the other.
        in_proj_bias: [3 * embed_dim] or None.
        out_proj: ``nn.Linear``.

    Shape:
        query [N, S, embed_dim] or [S, embed_dim]; key_padding_mask [N, S] or [S]; output as query.

    Raises:
        ValueError: a constructor argument is not one of those above.
        RuntimeError: from the operator, when the input does not fit.

    ``torch.jit.script`` takes it as a part of a model (``nn.Sequential(attn)`` where it is all of it): the
    two ways to call it are two methods to TorchScript, neither of which is named forward.
    """

    __constants__ = [
        "batch_first",
        "bias_k",
        "bias_v",
        "add_zero_attn",
        "design",
        "dropout",
        "embed_dim",
        "head_dim",
        "num_heads",
        "scripted_precision",
    ]
    in_proj_weight: Tensor
    bias_k: None
    bias_v: None
    # TorchScript compiles nn.TransformerEncoderLayer with a call to this, though it is not taken,
    merge_masks = nn.MultiheadAttention.merge_masks
    if TYPE_CHECKING:  # and only if this is known to be a tensor, or to be None: without a type
        in_proj_bias: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        version: Union[str, int] = "auto",
        batch_first: bool = True,
        *,
        precision: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, got {embed_dim}")
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"num_heads must divide embed_dim, {embed_dim}, got {num_heads}")
        if embed_dim // num_heads > MAX_HEAD_DIM:
            raise ValueError(
                f"embed_dim / num_heads must be at most {MAX_HEAD_DIM}, got {embed_dim} / {num_heads} = "
                f"{embed_dim // num_heads}; take more heads"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability from 0 to 1, got {dropout}")
        if version not in _DESIGNS or isinstance(version, bool):
            raise ValueError(f'version must be one of "auto", 1, 2, got {version!r}')
        if precision is not None:
            check_choice("precision", precision, PRECISIONS)
        self.embed_dim = self.kdim = self.vdim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = float(dropout)
        self.version = version
        self.design = _DESIGNS[version]
        self.batch_first = batch_first
        self.precision = precision
        self.scripted_precision = matmul_precision(precision)
        # As nn.MultiheadAttention without these options has them: others look.
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        # nn.TransformerEncoderLayer and nn.TransformerEncoder ask whether they may take a path of their own
        # past the modules inside, with the feed-forward layers' weights by name. They may not.
        self._qkv_same_embed_dim = False

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.in_proj_weight = parameter(3 * embed_dim, embed_dim)
        self.register_parameter("in_proj_bias", parameter(3 * embed_dim) if bias else None)
        self.out_proj = NonDynamicallyQuantizableLinear(
            embed_dim, embed_dim, bias=bias, device=device, dtype=dtype
        )
        nn.init.xavier_uniform_(self.in_proj_weight)
        self._reset_biases()

    def _reset_biases(self) -> None:
        if self.in_proj_bias is not None:
            nn.init.constant_(self.in_proj_bias, 0.0)
            nn.init.constant_(self.out_proj.bias, 0.0)

    def reset_parameters(self) -> None:
        """As ``nn.MultiheadAttention`` draws them."""
        self.out_proj.reset_parameters()
        nn.init.xavier_uniform_(self.in_proj_weight)
        self._reset_biases()

    @classmethod
    def from_torch(
        cls,
        attention: nn.MultiheadAttention,
        version: Union[str, int] = "auto",
        *,
        precision: str | None = None,
    ) -> "FusedAttention":
        """The fused form of an existing module, sharing its parameters.

        Args:
            attention: an ``nn.MultiheadAttention`` whose keys and values have the width of its queries,
                without ``add_bias_kv`` and ``add_zero_attn``.
            version: as in the constructor.
            precision: as in the constructor.

        Raises:
            TypeError: the module is of another class.
            ValueError: the module has something that the fused module does not.
        """
        check_type("attention", attention, nn.MultiheadAttention)
        if not attention._qkv_same_embed_dim:
            raise ValueError(
                f"kdim and vdim must be embed_dim, {attention.embed_dim}, got {attention.kdim} and "
                f"{attention.vdim}"
            )
        if attention.bias_k is not None or attention.bias_v is not None:
            raise ValueError("add_bias_kv must be False, got True")
        if attention.add_zero_attn:
            raise ValueError("add_zero_attn must be False, got True")
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.in_proj_bias is not None,
            version,
            attention.batch_first,
            precision=precision,
            device="meta",
        )
        new.in_proj_weight, new.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        new.out_proj = attention.out_proj
        return new.train(attention.training)

    @torch.jit._overload_method
    def forward(
        self,
        query: Tensor,
        key: None = None,
        value: None = None,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Tensor: ...

    @torch.jit._overload_method  # type: ignore[no-redef]
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]: ...

    def forward(  # type: ignore[no-redef]
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        """Attention of every query over the keys.

        Args:
            query: [N, S, embed_dim], or [S, N, embed_dim] where the batch is not first; without a batch
                [S, embed_dim].
            key: None: the query is key and value, and the result comes alone.
            value: of the key's length; given where the key is.
            key_padding_mask: [N, keys], or [keys] without a batch: bool, true where a key takes no part, or a
                float that is added to its scores.
            need_weights: with a key: whether the weights are to be returned.
            attn_mask: [queries, keys] or [N * num_heads, queries, keys], bool, true where the query does not
                see the key, or a float that is added to the score.
            average_attn_weights: whether the weights are those of all heads together.
            is_causal: no query sees a later key. ``attn_mask``, where given as well, has to say the same.

        Returns:
            The result, like query; with a key, the pair of it and the weights ([N, queries, keys], or [N,
            num_heads, queries, keys] where they are not averaged) or None.
        """
        if not _is_scripting():
            if is_symbolic(query):
                masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
                return call_in_graph(self, query, key, value, *masks)
        if key is None:
            if not _is_scripting() and attn_mask is None:
                output = _infer(self, query, key_padding_mask, is_causal)
                if output is not None:
                    return output
            return self._attend(query, query, query, key_padding_mask, False, attn_mask, False, is_causal)[0]
        if value is None:
            raise TypeError("FusedAttention: value must be given where key is")
        return self._attend(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor],
        need_weights: bool,
        attn_mask: Optional[Tensor],
        average_attn_weights: bool,
        is_causal: bool,
    ) -> _AttentionAndWeights:
        weights: Optional[Tensor] = None
        fused = query is key and key is value and not need_weights
        if attn_mask is not None and not is_causal:
            fused = False
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            fused = False
        if self.training and self.dropout > 0.0:
            fused = False
        if not fused:
            return self._attend_by_torch(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.is_nested:
            return self._attend_nested(query, is_causal), weights
        if query.dim() == 2:
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
            return self._operator(query.unsqueeze(0), key_padding_mask, is_causal).squeeze(0), weights
        if self.batch_first:
            return self._operator(query, key_padding_mask, is_causal), weights
        return self._operator(query.transpose(0, 1), key_padding_mask, is_causal).transpose(0, 1), weights

    def _attend_nested(self, query: Tensor, is_causal: bool) -> Tensor:
        """Sequences of several lengths, as ``nn.TransformerEncoder`` packs them in inference."""
        padded = query.to_padded_tensor(0.0)
        lengths = query._nested_tensor_size()[:, 0].to(query.device)
        mask = torch.arange(padded.shape[1], device=query.device) >= lengths[:, None]
        output = self._operator(padded, mask, is_causal)
        result: Tensor = torch._nested_from_padded_and_nested_example(output, query)
        return result

    def _operator(self, input: Tensor, key_padding_mask: Optional[Tensor], is_causal: bool) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._call(
                input,
                self.in_proj_weight,
                self.in_proj_bias,
                self.out_proj.weight,
                self.out_proj.bias,
                key_padding_mask,
                is_causal,
                self.scripted_precision,
            )
        precision = matmul_precision(self.precision)
        with matmuls_of_module(input, precision):
            return self._call(input, *self._tensors(), key_padding_mask, is_causal, precision)

    def _call(
        self,
        input: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Optional[Tensor],
        out_weight: Tensor,
        out_bias: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        is_causal: bool,
        precision: str,
    ) -> Tensor:
        if self.design == 1:
            output: Tensor = torch.ops.styleforge.fused_attention_v1(
                input,
                qkv_weight,
                qkv_bias,
                out_weight,
                out_bias,
                self.num_heads,
                None,
                is_causal,
                key_padding_mask,
                precision,
            )
        elif self.design == 2:
            output = torch.ops.styleforge.fused_attention_v2(
                input,
                qkv_weight,
                qkv_bias,
                out_weight,
                out_bias,
                self.num_heads,
                None,
                is_causal,
                key_padding_mask,
                precision,
            )
        else:
            output = torch.ops.styleforge.fused_attention(
                input,
                qkv_weight,
                qkv_bias,
                out_weight,
                out_bias,
                self.num_heads,
                None,
                is_causal,
                key_padding_mask,
                precision,
            )
        return output

    def _attend_by_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor],
        need_weights: bool,
        attn_mask: Optional[Tensor],
        average_attn_weights: bool,
        is_causal: bool,
    ) -> _AttentionAndWeights:
        swaps = self.batch_first and query.dim() == 3
        if swaps:  # what was one tensor stays one: PyTorch then projects it once
            if key is value:
                if query is key:
                    query = key = value = query.transpose(0, 1)
                else:
                    query, key = query.transpose(0, 1), key.transpose(0, 1)
                    value = key
            else:
                query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if is_causal and attn_mask is None:
            length = query.shape[0], key.shape[0]
            attn_mask = torch.ones(length, dtype=torch.bool, device=query.device).triu(1)
            if key_padding_mask is not None and key_padding_mask.is_floating_point():
                attn_mask = torch.zeros(
                    length, dtype=key_padding_mask.dtype, device=query.device
                ).masked_fill(attn_mask, float("-inf"))
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            None,
            None,
            False,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if swaps:
            output = output.transpose(0, 1)
        return output, weights

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        # nn.Module finds a parameter only after it has looked everywhere else for an attribute of that name.
        try:
            parameters, out_proj = self._parameters, self._modules["out_proj"]
            assert out_proj is not None
            of_out = out_proj._parameters
            qkv_weight, qkv_bias = parameters["in_proj_weight"], parameters["in_proj_bias"]
            out_weight, out_bias = of_out["weight"], of_out["bias"]
        except KeyError:  # a parametrization or a wrapper keeps them elsewhere
            return self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias
        assert qkv_weight is not None and out_weight is not None
        return qkv_weight, qkv_bias, out_weight, out_bias

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"{self.embed_dim}, {self.num_heads}"
        if self.dropout > 0:
            text += f", dropout={self.dropout}"
        if self.in_proj_bias is None:
            text += ", bias=False"
        text += f", version={self.version}"
        return text if self.batch_first else f"{text}, batch_first=False"


def _infer(
    module: FusedAttention, query: Tensor, key_padding_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """The operator by the shortest way, for the usual call without gradients; None for any other.

    On the host a short sequence costs what Python and the dispatcher cost.
    """
    if not autograd_is_idle(query) or key_padding_mask is not None or query.dim() != 3 or query.is_nested:
        return None
    own = module.__dict__  # attributes of an nn.Module take three times as long
    if not own["batch_first"] or (own["training"] and own["dropout"] > 0.0):
        return None
    precision = precision_of_products(own["precision"], query)
    if precision is None:
        return None  # PyTorch's own products are to be told
    try:
        of_out = own["_modules"]["out_proj"].__dict__["_parameters"]
        parameters = own["_parameters"]
        qkv_weight, qkv_bias = parameters["in_proj_weight"], parameters["in_proj_bias"]
        out_weight, out_bias = of_out["weight"], of_out["bias"]
    except KeyError:  # a parametrization or a wrapper keeps them elsewhere
        return None
    operator, heads = _OPERATORS[own["design"]], own["num_heads"]
    guard = BelowAutograd()
    try:
        if precision == "ieee" and not is_causal:  # the operator's defaults, which take no conversion
            output: Tensor = operator(query, qkv_weight, qkv_bias, out_weight, out_bias, heads)
        else:
            rest = (None, is_causal, None, precision)
            output = operator(query, qkv_weight, qkv_bias, out_weight, out_bias, heads, *rest)
        return output
    finally:
        del guard
