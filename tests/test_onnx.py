"""ONNX: every operator and argument through both of PyTorch's exporters, checked, run in ONNX Runtime."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import styleforge
from _onnx import load, needs_onnx, nodes, run
from _reference import max_error, tensor
from styleforge.onnx._translations import TRANSLATIONS
from styleforge.ops import _common as common

needs_onnx()
import onnx  # noqa: E402

NORM = torch.ops.styleforge.fused_instance_norm
CONV = torch.ops.styleforge.fused_conv_instance_norm_relu
FFN = torch.ops.styleforge.fused_ffn
ATTENTION = getattr(torch.ops.styleforge, "fused_attention", None)
PAD = torch.ops.styleforge._pad_upsample
REFLECT = torch.ops.styleforge._reflect_conv2d

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name. .* will not be used:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
]


class Call(nn.Module):
    """One operator call; its tensors but the first are parameters, except those named in ``inputs``."""

    def __init__(self, operator: Callable[..., Tensor], tensors: dict[str, Tensor], options: dict[str, Any]):
        super().__init__()
        self.operator = operator
        self.options = options
        self.names = list(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def per_sample(self) -> bool:
        """Whether norm parameters are [N, C]; N is 2."""
        return any(b.shape[:1] == (2,) for name, b in self.named_buffers() if not name.startswith("fc"))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        given = {name: getattr(self, name) for name in self.names}
        if residual is not None:
            given["residual"] = residual
        return self.operator(x, **given, **self.options)


def _affine(*sizes: int, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + "weight": torch.rand(sizes) + 0.5, prefix + "bias": torch.randn(sizes)}


def _conv(out: int = 5, kernel: tuple[int, int] = (3, 3)) -> dict[str, Tensor]:
    return {"weight": torch.randn(out, 4, *kernel) / 6}


def _ffn(bias: bool = True) -> dict[str, Tensor | None]:
    return {
        "fc1_weight": torch.randn(10, 4) / 2,
        "fc1_bias": torch.randn(10) if bias else None,
        "fc2_weight": torch.randn(6, 10) / 3,
        "fc2_bias": torch.randn(6) if bias else None,
    }


def _attention(embed_dim: int = 12, bias: bool = True) -> dict[str, Tensor | None]:
    return {
        "qkv_weight": torch.randn(3 * embed_dim, embed_dim) / 2,
        "qkv_bias": torch.randn(3 * embed_dim) if bias else None,
        "out_weight": torch.randn(embed_dim, embed_dim) / 3,
        "out_bias": torch.randn(embed_dim) if bias else None,
    }


# Operator, parameters, other arguments, whether a residual is an input, what the graph consists of.
Case = tuple[Callable[..., Tensor], dict[str, Any], dict[str, Any], bool, str]
ACTIVATION_NODES = {"none": "", "silu": "Sigmoid Mul", "leaky_relu": "LeakyRelu"}
CASES: dict[str, Callable[[], Case]] = {
    "norm": lambda: (NORM, {}, {}, False, "InstanceNormalization"),
    "norm, eps": lambda: (NORM, _affine(4), {"eps": 0.3}, False, "InstanceNormalization"),
    "norm, weight alone": lambda: (
        NORM,
        {"weight": torch.rand(4)},
        {"activation": "relu"},
        True,
        "InstanceNormalization Add Relu",
    ),
    "norm, bias alone": lambda: (NORM, {"bias": torch.rand(4)}, {}, False, "InstanceNormalization"),
    "norm, per sample": lambda: (
        NORM,
        _affine(2, 4),
        {"activation": "leaky_relu", "negative_slope": 0.3},
        True,
        "InstanceNormalization Mul Add Add LeakyRelu",
    ),
    "norm, bias per sample": lambda: (
        NORM,
        {"bias": torch.rand(2, 4)},
        {"activation": "tanh"},
        False,
        "InstanceNormalization Add Tanh",
    ),
    **{
        f"norm, {name}": lambda name=name: (
            NORM,
            _affine(4),
            {"activation": name, "negative_slope": 0.2},
            False,
            "InstanceNormalization " + ACTIVATION_NODES.get(name, name.capitalize()),
        )
        for name in common.ACTIVATIONS
    },
    "conv": lambda: (CONV, _conv(), {}, False, "Conv InstanceNormalization Relu"),
    "conv, bias": lambda: (
        CONV,
        {**_conv(), "bias": torch.randn(5)},
        {"precision": "tf32"},
        False,
        "Conv InstanceNormalization Relu",
    ),
    "conv, norm parameters, residual, kernel and stride not square": lambda: (
        CONV,
        {**_conv(5, (3, 1)), **_affine(5, prefix="norm_")},
        {"stride": [2, 1], "padding": [2, 0], "activation": "none"},
        True,
        "Conv InstanceNormalization Add",
    ),
    "conv, per sample": lambda: (
        CONV,
        {**_conv(), **_affine(2, 5, prefix="norm_")},
        {"activation": "silu", "eps": 0.1},
        False,
        "Conv InstanceNormalization Mul Add Sigmoid Mul",
    ),
    **{
        f"conv, {mode}, upsampled by {upsample}": lambda mode=mode, upsample=upsample: (
            CONV,
            {**_conv(), **_affine(5, prefix="norm_")},
            {
                "padding": [2, 1],
                "padding_mode": mode,
                "upsample": upsample,
                "activation": "leaky_relu",
                "negative_slope": 0.2,
            },
            False,
            ("Resize " if upsample == 2 else "")
            + ("" if mode == "zeros" else "Pad ")
            + "Conv InstanceNormalization LeakyRelu",
        )
        for mode in common.PADDING_MODES
        for upsample in (1, 2)
    },
    **{
        f"ffn, {name}": lambda name=name: (
            FFN,
            _ffn(),
            {"activation": name},
            False,
            "MatMul Add " + {"relu": "Relu", "silu": "Sigmoid Mul"}.get(name, "Gelu") + " MatMul Add",
        )
        for name in common.FFN_ACTIVATIONS
    },
    "ffn, no bias, residual": lambda: (
        FFN,
        _ffn(bias=False),
        {"activation": "relu"},
        True,
        "MatMul Relu MatMul Add",
    ),
    **{
        f"pad, {mode}": lambda mode=mode: (PAD, {}, {"padding": [1, 2], "padding_mode": mode}, False, "Pad")
        for mode in common.PADDING_MODES
    },
    "upsample and pad": lambda: (
        PAD,
        {},
        {"padding": [1, 1], "padding_mode": "reflect", "upsample": 2},
        False,
        "Resize Pad",
    ),
    "reflect_conv2d": lambda: (REFLECT, {"weight": torch.randn(3, 4, 5, 3) / 8}, {}, False, "Pad Conv"),
    "reflect_conv2d, bias": lambda: (
        REFLECT,
        {"weight": torch.randn(3, 4, 3, 3) / 6, "bias": torch.randn(3)},
        {"precision": "tf32"},
        False,
        "Pad Conv",
    ),
}


ATTENTION_NODES = {"MatMul": 4, "Reshape": 2, "Transpose": 3, "Split": 1, "Mul": 1, "Softmax": 1}  # no bias


@pytest.mark.skipif(ATTENTION is None, reason="this build has no attention")
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(is_causal: bool, masked: bool, dtype: torch.dtype, exporter: str, tmp_path: Path) -> None:
    """Dynamic batch and length; a token that sees nothing gives the bias alone."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in _attention(bias=masked).items():
                self.register_buffer(name, value)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            given = (x, self.qkv_weight, self.qkv_bias, self.out_weight, self.out_bias, 3)
            return ATTENTION(*given, 0.4 if masked else None, is_causal, mask)

    def inputs(batch: int, length: int) -> list[Tensor]:
        x = torch.randn(batch, length, 12).to(dtype)
        if not masked:
            return [x]
        mask = torch.rand(batch, length) < 0.3
        mask[0], mask[1] = True, False
        return [x, mask]

    module = Attention().to(dtype).eval()
    path = tmp_path / "model.onnx"
    if exporter == "dynamo":
        shapes = tuple({0: "batch", 1: "length"} for _ in inputs(2, 7))
        styleforge.onnx.export(module, tuple(inputs(2, 7)), path, dynamic_shapes=shapes)
    else:
        styleforge.onnx.register_symbolics()
        names = ["x", "mask"][: 1 + masked]
        torch.onnx.export(
            module,
            tuple(inputs(2, 7)),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=names,
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        )
    found = nodes(load(path))
    if dtype == torch.float32 and not masked and not is_causal:
        assert found == ATTENTION_NODES
    for sizes in ((2, 7), (3, 1), (2, 20)):
        given = inputs(*sizes)
        with torch.no_grad():
            expected = module(*given)
        error = max_error(run(path, *given), expected.double())
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


def _export(module: Call, inputs: Sequence[Tensor], path: Path, exporter: str) -> None:
    """Dynamic in every dimension but the channels, and the batch where it is a parameter's."""
    fixed = {inputs[0].dim() - 1} if module.operator is FFN else {1}
    if module.per_sample():
        fixed.add(0)
    dynamic = {d: f"d{d}" for d in range(inputs[0].dim()) if d not in fixed}
    if exporter == "dynamo":
        shapes = tuple({d: torch.export.Dim.DYNAMIC for d in dynamic} for _ in inputs)
        styleforge.onnx.export(module, tuple(inputs), path, dynamic_shapes=shapes)
        return
    styleforge.onnx.register_symbolics()
    names = ["x", "residual"][: len(inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs),
            str(path),
            dynamo=False,
            opset_version=20,
            input_names=names,
            dynamic_axes=dict.fromkeys(names, dynamic),
        )


def _inputs(module: Call, sizes: Sequence[int], residual: bool, dtype: torch.dtype) -> list[Tensor]:
    if module.operator is FFN:
        sizes = (*sizes[:-1], 4)
    x = torch.randn(sizes).to(dtype)
    if not residual:
        return [x]
    with torch.no_grad():
        return [x, torch.randn_like(module(x))]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("name", CASES)
def test_operator(name: str, exporter: str, tmp_path: Path) -> None:
    """The smallest graph; what ONNX Runtime computes is equal, at other sizes than the example's too."""
    operator, parameters, options, residual, expected_nodes = CASES[name]()
    module = Call(operator, parameters, options).eval()
    path = tmp_path / "model.onnx"
    _export(module, _inputs(module, (2, 4, 8, 6), residual, torch.float32), path, exporter)
    assert nodes(load(path)) == Counter(expected_nodes.split())
    for sizes in ((2, 4, 8, 6), (2 if module.per_sample() else 3, 4, 5, 11)):
        inputs = _inputs(module, sizes, residual, torch.float32)
        with torch.no_grad():
            expected = module(*inputs)
        result = run(path, *inputs)
        assert result.shape == expected.shape
        assert max_error(result, expected.double()) < 1e-5


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    "name", ["norm, silu", "norm, per sample", "conv, reflect, upsampled by 2", "ffn, gelu"]
)
def test_half_precision(name: str, exporter: str, tmp_path: Path) -> None:
    operator, parameters, options, residual, _ = CASES[name]()
    wide = Call(operator, parameters, options).eval()
    narrow = Call(operator, parameters, options).half().eval()
    path = tmp_path / "model.onnx"
    inputs = _inputs(narrow, (2, 4, 8, 6), residual, torch.float16)
    _export(narrow, inputs, path, exporter)
    load(path)
    wide.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        expected = wide(*(value.float() for value in inputs)).double()
        yardstick = max_error(narrow(*inputs), expected)
    result = run(path, *inputs)
    assert result.dtype == torch.float16
    assert max_error(result, expected) < 2 * yardstick + 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_norm_is_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """As the operator does: a cast on the way in and one, after the activation, on the way out."""
    module = Call(NORM, _affine(4), {"activation": "silu"}).to(dtype).eval()
    program = styleforge.onnx.export(module, (torch.randn(2, 4, 5, 6, dtype=dtype),))
    onnx.checker.check_model(program.model_proto, full_check=True)
    names = [node.op_type for node in program.model.graph]
    assert names.count("Cast") == 2 and names[-1] == "Cast"
    assert names.index("Cast") < names.index("InstanceNormalization")


def test_float32_norm_parameters_of_a_half_precision_input(tmp_path: Path) -> None:
    module = Call(NORM, _affine(4), {}).eval()
    x = torch.randn(2, 4, 5, 6).half()
    styleforge.onnx.export(module, (x,), tmp_path / "model.onnx")
    assert nodes(load(tmp_path / "model.onnx")) == Counter({"Cast": 2, "InstanceNormalization": 1})
    torch.testing.assert_close(run(tmp_path / "model.onnx", x), module(x), rtol=1e-3, atol=1e-3)


def test_float64(tmp_path: Path) -> None:
    """ONNX Runtime has no float64 norm; ONNX's own reference has."""
    module = Call(NORM, _affine(4), {"activation": "sigmoid"}).double().eval()
    x = tensor(2, 4, 5, 6, dtype=torch.float64)
    styleforge.onnx.export(module, (x,), tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    assert nodes(model) == Counter(["InstanceNormalization", "Sigmoid"])
    from onnx.reference import ReferenceEvaluator

    (output,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    assert max_error(torch.from_numpy(output), module(x)) < 1e-10


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_ffn_of_any_rank(rank: int, tmp_path: Path) -> None:
    module = Call(FFN, _ffn(), {}).eval()
    x = torch.randn(3, 2, 5, 4)[(0,) * (4 - rank)]
    styleforge.onnx.export(module, (x,), tmp_path / "model.onnx")
    one = ["Gemm", "Gelu", "Gemm"] if rank == 2 else ["MatMul", "Add", "Gelu", "MatMul", "Add"]
    assert nodes(load(tmp_path / "model.onnx")) == Counter(one)
    assert max_error(run(tmp_path / "model.onnx", x), module(x).double()) < 1e-5


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_before_it_was_an_operator(activation: str, exporter: str, tmp_path: Path) -> None:
    """Version 18 of the operator set has none; the caller's own torch.onnx.export decides."""
    module = Call(FFN, _ffn(), {"activation": activation}).eval()
    path = tmp_path / "model.onnx"
    x = torch.randn(2, 3, 4)
    if exporter == "dynamo":
        table = styleforge.onnx.translation_table()
        program = torch.onnx.export(
            module, (x,), dynamo=True, opset_version=18, custom_translation_table=table, verbose=False
        )
        program.save(path)
    else:
        styleforge.onnx.register_symbolics()
        torch.onnx.export(module, (x,), str(path), dynamo=False, opset_version=17)
    model = load(path)
    assert model.opset_import[0].version < 20
    assert ("Erf" if activation == "gelu" else "Tanh") in nodes(model)
    assert max_error(run(path, x), module(x).double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gelu_before_it_was_an_operator(dtype: torch.dtype) -> None:
    """From its parts it is computed in float32, and rounded once."""
    module = Call(FFN, _ffn(), {}).to(dtype).eval()
    program = styleforge.onnx.export(module, (torch.randn(2, 3, 4).to(dtype),), opset_version=18)
    onnx.checker.check_model(program.model_proto, full_check=True)
    names = [node.op_type for node in program.model.graph]
    assert names.count("Cast") == 2
    assert names.index("Cast") < names.index("Erf")


def test_opset_versions_without_translations_are_refused() -> None:
    with pytest.raises(ValueError, match="opset_version must be at least 18, got 17"):
        styleforge.onnx.export(nn.ReLU(), (torch.ones(1),), opset_version=17)


def test_channels_may_be_dynamic_without_parameters(tmp_path: Path) -> None:
    module = Call(NORM, {}, {"activation": "relu"}).eval()
    shapes = ({1: torch.export.Dim.DYNAMIC},)
    styleforge.onnx.export(module, (torch.randn(2, 4, 5, 6),), tmp_path / "model.onnx", dynamic_shapes=shapes)
    load(tmp_path / "model.onnx")
    x = torch.randn(2, 7, 5, 6)
    assert max_error(run(tmp_path / "model.onnx", x), module(x).double()) < 1e-5


# --- the table ------------------------------------------------------------------------------------


def test_the_table_names_every_forward_operator() -> None:
    """A new operator needs a translation; what only training calls has none."""
    schemas = torch._C._jit_get_all_schemas()
    names = {
        schema.name.removeprefix("styleforge::")
        for schema in schemas
        if schema.name.startswith("styleforge::")
    }
    training = {"_column_gradient", "_convolution", "_convolution_backward", "_unfold_columns", "_widen"}
    assert training < names
    inference = {name for name in names - training if not name.endswith(("_forward", "_backward"))}
    table = styleforge.onnx.translation_table()
    assert {overload._schema.name.removeprefix("styleforge::") for overload in table} == inference


def test_translations_take_what_the_schemas_say() -> None:
    for name, translate in TRANSLATIONS.items():
        if not hasattr(torch.ops.styleforge, name):
            continue
        schema = getattr(torch.ops.styleforge, name).default._schema
        parameters = list(inspect.signature(translate).parameters.values())[1:]
        assert [p.name for p in parameters] == [argument.name for argument in schema.arguments], name
        for parameter, argument in zip(parameters, schema.arguments, strict=True):
            given = None if parameter.default is inspect.Parameter.empty else parameter.default
            default = argument.default_value
            assert (list(given) if isinstance(given, tuple) else given) == default, (name, parameter.name)
