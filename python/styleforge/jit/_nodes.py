"""Descriptions of TorchScript nodes, and the nodes of a block as steps.

Values are known by their debug names, which are unique in a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from styleforge.fuse import _operations as ops
from styleforge.fuse._operations import Operation
from styleforge.fuse._patterns import Key, Step

Node = Any  # torch._C.Node; its bindings have no types
Value = Any
Block = Any

_ACTIVATIONS = ("relu", "silu", "sigmoid", "tanh")
_PADS = {"aten::reflection_pad2d": "reflect", "aten::replication_pad2d": "replicate"}
# What a size goes through on its way to an error message.
_INTEGERS = {
    "size",
    "dim",
    "len",
    "eq",
    "ne",
    "mul",
    "sub",
    "format",
    "__getitem__",
    "__contains__",
    "__not__",
} | {
    "__range_length",
    "__derive_index",
}
_MESSAGES = ("aten::format", "aten::warn", "prim::RaiseException", "prim::Constant")


class Name(str):
    """The name of a value, told apart from the strings among an operator's arguments."""


def nodes_of(block: Block) -> dict[str, Node]:
    """The block's nodes by the name of their first output; those without outputs have names of their own."""
    named: dict[str, Node] = {}
    for index, node in enumerate(block.nodes()):
        first = next(iter(node.outputs()), None)
        named[Name(first.debugName() if first is not None else f"<{node.kind()} {index}>")] = node
    return named


def steps_of(here: dict[str, Node]) -> list[Step]:
    """The nodes of a block as steps, in order."""
    return [*(_step(key, node, here) for key, node in here.items()), Step("<return>", "return")]


def _step(key: str, node: Node, here: dict[str, Node]) -> Step:
    kind = node.kind()
    step = Step(key, kind.split("::")[-1])
    if kind in ("prim::Constant", "prim::GetAttr"):
        step.outside = True
        return step
    tensors = tuple(Name(v.debugName()) for v in node.inputs() if _holds_tensors(v))
    schema = str(node.schema())
    norm = norm_layer(node)
    if norm is not None:
        step.name, step.operation = "instance_norm", norm
        step.users = _readers(node, here)
        return step
    if list(node.blocks()):
        inner = list(inside(node))
        captured = (Name(v.debugName()) for n in inner for v in n.inputs() if _holds_tensors(v))
        step.aliases = (*tensors, *captured)
        step.barrier = any("!" in str(n.schema()) or n.kind() in _MAY_WRITE for n in inner)
        return step
    if schema.startswith("(no schema)"):
        step.aliases = tensors
        step.barrier = kind in _MAY_WRITE
        return step
    arguments, _, results = schema.partition("->")
    if "!" in arguments:
        step.writes = tensors
    if "(" in results.strip().removeprefix("("):  # Tensor(a): a view, or the tensor that was written to
        step.aliases = tensors
    outputs = list(node.outputs())
    if len(outputs) == 1:
        step.operation = describe(node)
        step.users = _readers(node, here)
        if isinstance(step.operation, ops.Identity):
            step.aliases = tensors
    return step


def _readers(node: Node, here: dict[str, Node]) -> list[Key]:
    """Names of the nodes that read a node's value for more than checks; a whole norm layer reads it once."""
    found: list[Key] = []
    for key in users_of(node.output(), here):
        user = here.get(key)
        layer = user is not None and norm_layer(user) is not None
        if not (layer and key in found) and (layer or not only_checks(user, here)):
            found.append(key)
    return found


_MAY_WRITE = ("prim::CallMethod", "prim::CallFunction", "prim::SetAttr", "prim::fork", "aten::wait")


def users_of(value: Value, here: dict[str, Node]) -> list[str]:
    """Names of the nodes of a block that read a value, or have a node inside that does; "<return>" else."""
    names = {id(node): key for key, node in here.items()}  # the bindings give one object for one node
    found: list[str] = []
    for use in value.uses():
        node = use.user
        while node is not None and id(node) not in names:
            node = node.owningBlock().owningNode()
        found.append(names[id(node)] if node is not None else "<return>")
    return found


def only_checks(node: Node | None, here: dict[str, Node]) -> bool:
    """Whether a node only works out sizes for error messages, as PyTorch's own Python code does.

    The condition of a norm layer (``norm_layer``) counts as such.
    """
    if node is None:
        return False
    if _is_message(node) or norm_layer(node) is not None:
        return True
    if not _is_integer(node) and node.kind() != "prim::Loop":
        return False
    writes = any("!" in str(inner.schema()) for inner in inside(node))
    if writes or any(_holds_tensors(output) for output in node.outputs()):
        return False
    users = [key for output in node.outputs() for key in users_of(output, here)]
    return all(only_checks(here.get(key), here) for key in users)


def _is_message(node: Node) -> bool:
    """Whether it is an ``if`` that does nothing but raise or warn."""
    if node.kind() != "prim::If" or list(node.outputs()):
        return False
    return all(inner.kind() in _MESSAGES for inner in inside(node))


def norm_layer(node: Node) -> ops.Norm | None:
    """What ``nn.InstanceNorm2d.forward`` is in TorchScript.

    ``squeeze(norm(unsqueeze(x, 0)), 0) if x.dim() == 3 else norm(x)``, with checks of sizes in both.
    """
    if node.kind() != "prim::If" or len(list(node.outputs())) != 1:
        return None
    single, batch = ([n for n in b.nodes() if _is_layer(n)] for b in node.blocks())
    if [n.kind() for n in single] != ["aten::unsqueeze", "aten::instance_norm", "aten::squeeze"]:
        return None
    if [n.kind() for n in batch] != ["aten::instance_norm"]:
        return None
    x = batch[0].inputsAt(0)
    same = [v.debugName() for v in batch[0].inputs()][1:] == [v.debugName() for v in single[1].inputs()][1:]
    chained = single[0].inputsAt(0).debugName() == x.debugName()
    chained &= single[1].inputsAt(0).debugName() == single[0].output().debugName()
    chained &= single[2].inputsAt(0).debugName() == single[1].output().debugName()
    first = single[0].inputsAt(1).toIValue() == 0 and single[2].inputsAt(1).toIValue() == 0
    returned = [next(iter(b.outputs())).debugName() for b in node.blocks()]
    ends = returned == [single[2].output().debugName(), batch[0].output().debugName()]
    condition = node.inputsAt(0).node()
    asked = condition.kind() == "aten::eq" and condition.inputsAt(1).toIValue() == 3
    rank = condition.inputsAt(0).node() if asked else None
    asked = rank is not None and rank.kind() == "aten::dim" and rank.inputsAt(0).debugName() == x.debugName()
    parameters = [batch[0].inputsAt(i).node() for i in (1, 2)]
    local = any(id(p) == id(n) for p in parameters for b in node.blocks() for n in b.nodes())
    if local or not (same and chained and first and ends and asked):
        return None
    return replace(_instance_norm(Name(x.debugName()), list(batch[0].inputs())), unbatched=True)


def _is_layer(node: Node) -> bool:
    """Whether a node inside of a norm layer computes with tensors, rather than checks sizes."""
    return any(_holds_tensors(output) for output in node.outputs()) or not (
        _is_message(node) or node.kind() in ("prim::Loop", "prim::Constant") or _is_integer(node)
    )


def _is_integer(node: Node) -> bool:
    return node.kind().removeprefix("aten::") in _INTEGERS


def checks_of(value: Value, here: dict[str, Node]) -> Iterator[Node]:
    """The nodes that check a value's size (``only_checks``), some of them more than once."""
    for key in users_of(value, here):
        node = here.get(key)
        if node is not None and only_checks(node, here):
            for output in node.outputs():
                yield from checks_of(output, here)
            yield node


def inside(node: Node) -> Iterator[Node]:
    for block in node.blocks():
        for inner in block.nodes():
            yield inner
            yield from inside(inner)


def _holds_tensors(value: Value) -> bool:
    return "Tensor" in str(value.type())


# --- descriptions ---------------------------------------------------------------------------------


def describe(node: Node) -> Operation | None:
    """What a node computes; None where that is not known here."""
    kind: str = node.kind()
    values = list(node.inputs())
    if not kind.startswith("aten::") or not values or str(values[0].type()) != "Tensor":
        return None
    x = Name(values[0].debugName())
    name = kind.removeprefix("aten::").removesuffix("_")
    if name in ("conv2d", "_convolution", "convolution"):
        return _convolution(name, x, values)
    if name == "instance_norm":
        return _instance_norm(x, values)
    if name in _ACTIVATIONS:
        return ops.Activation(x, name)
    if name == "leaky_relu":
        slope = values[1].toIValue()
        return ops.Activation(x, name, float(slope)) if slope is not None else None
    if name == "gelu":
        return ops.gelu(x, values[1].toIValue() if len(values) > 1 else "none")
    if name == "pad":
        return ops.pad(x, *(v.toIValue() for v in values[1:]))
    if kind in _PADS:
        return ops.pad(x, values[1].toIValue(), _PADS[kind])
    if name == "constant_pad_nd":
        return ops.pad(x, values[1].toIValue(), "constant", values[2].toIValue())
    if name in ("upsample_nearest2d", "_upsample_nearest_exact2d") and len(values) == 3:
        size = None if _is_none(values[1]) else "given"
        return ops.upsample(x, size, values[2].toIValue(), "nearest", None, None, False)
    if name == "linear":
        return ops.Linear(x, values[1], values[2])
    if name in ("dropout", "feature_dropout"):
        return ops.Identity(x) if values[2].toIValue() is False else None
    if name.startswith("conv_transpose"):
        return ops.Other(x, "ConvTranspose")
    if name == "_transformer_encoder_layer_fwd":
        return ops.Other(x, "TransformerEncoderLayer in inference")
    if name == "add" and len(values) == 3 and str(values[1].type()) == "Tensor":
        return (
            ops.Add(x, Name(values[1].debugName()), kind.endswith("_")) if values[2].toIValue() == 1 else None
        )
    return None


def _convolution(name: str, x: str, values: list[Value]) -> Operation | None:
    weight, bias = values[1], values[2]
    if name == "conv2d":
        stride, padding, dilation, groups = (v.toIValue() for v in values[3:7])
    else:
        stride, padding, dilation, transposed, _, groups = (v.toIValue() for v in values[3:9])
        if transposed is not False:
            return ops.Other(x, "ConvTranspose") if transposed else None
        if not isinstance(stride, list) or len(stride) != 2:
            return None
    return ops.conv(x, weight, bias, stride, padding, dilation, groups)


def _instance_norm(x: str, values: list[Value]) -> ops.Norm:
    eps = values[7].toIValue()
    problem = None
    if not _is_none(values[3]) or not _is_none(values[4]):
        problem = "it has running statistics"
    elif values[5].toIValue() is not True:
        problem = "use_input_stats is not True"
    elif eps is None:
        problem = "eps is not constant"
    return ops.Norm(x, values[1], values[2], eps if eps is not None else 0.0, False, problem)


def _is_none(value: Value) -> bool:
    return str(value.type()) == "NoneType" or (
        value.node().kind() == "prim::Constant" and value.node().mustBeNone()
    )
