"""Rewrites fx graphs: those traced from modules, and those that torch.compile captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
import torch.nn as nn

from styleforge.fuse import _attention, _calls, _functions, _layers
from styleforge.fuse import _in_place as _in_place_functions
from styleforge.fuse import _operations as ops
from styleforge.fuse._operations import Attribute, Ref
from styleforge.fuse._patterns import AttentionSite, FFNSite, Finder, LastConvSite, Left, NormSite, Site, Step
from styleforge.ops import conv_precision, matmul_precision

# What gives a tensor of its own, unless it is told to work in place.
_NEW = (ops.Conv, ops.Norm, ops.Activation, ops.Pad, ops.Upsample, ops.Add, ops.Linear, ops.Attention)


def rewrite(graph: fx.Graph, root: nn.Module) -> tuple[list[Site], list[Left]]:
    """Puts fused operators in the place of what they compute, in place.

    Args:
        graph: of torch-level calls; ``call_module`` targets are layers of ``root``.
        root: what the graph's attributes belong to.

    Returns:
        The sites that were fused, and what was left with the reasons.
    """
    _ignore_weights(graph, root)
    sites, left = Finder(steps_of(graph, root)).find()
    replaced: dict[Ref, fx.Node] = {}  # a site may read what another one gave
    for site in sites:
        _replace(graph, site, replaced)
        if isinstance(site, NormSite) and site.conv is None:
            _drop_bias(graph, root, replaced[site.steps[-1].key])
    return sites, left


def steps_of(graph: fx.Graph, root: nn.Module) -> list[Step]:
    """Every node as a step, in order."""
    users: dict[fx.Node, list[Any]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        for argument in _values(node):
            users[argument].append(node)
    return [_step(node, users[node], root) for node in graph.nodes]


def _values(node: fx.Node) -> list[fx.Node]:
    """Every node that this one reads, as often as it reads it."""
    found: list[fx.Node] = []

    def note(value: fx.Node) -> fx.Node:
        found.append(value)
        return value

    fx.map_arg((node.args, node.kwargs), note)
    return found


def _step(node: fx.Node, users: list[Any], root: nn.Module) -> Step:
    if node.op in ("placeholder", "get_attr"):
        return Step(node, node.name, users=users, outside=True)
    if node.op == "output":
        return Step(node, node.name)
    values = tuple(_values(node))
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        operation = None
        if len(values) == 1 and len(node.args) + len(node.kwargs) == 1:
            operation = _layers.describe(module, str(node.target), values[0])
        step = Step(node, str(node.target), operation, users)
        if operation is None and not _well_known(module):
            step.writes = values  # may do what it likes with them
        elif getattr(module, "inplace", False):
            step.writes = values[:1]
    else:
        args, kwargs = node.args, dict(node.kwargs)
        if node.target in _functions.NEEDS_CONSTANTS:
            args, kwargs = fx.map_arg((args, kwargs), _constant)
        operation = _functions.describe(node.target, args, kwargs)
        if isinstance(operation, (ops.Attention, ops.EncoderLayer)):
            operation = _checked(operation, users)
        if isinstance(operation, ops.Conv):
            operation = replace(operation, sizes=_sizes(operation.weight))
        step = Step(node, _call_name(node), operation, users)
        if _in_place(node):
            step.writes = values if "out" in node.kwargs or _schemas(node.target) else values[:1]
        elif not _from_known_package(node):
            step.writes = values  # a function of the user's: torch.fx.wrap, allow_in_graph
        step.barrier = _changes_mode(node)
    if not isinstance(operation, _NEW) or step.writes:
        step.aliases = values
    return step


def _checked(
    operation: ops.Attention | ops.EncoderLayer, users: list[Any]
) -> ops.Attention | ops.EncoderLayer:
    """The attention, refused where its weights are read or its padding mask is not boolean."""
    if isinstance(operation, ops.Attention):
        if not all(_takes_output(user) for user in users):
            return replace(operation, problem="its attention weights are used")
        mask = operation.key_padding_mask
    else:
        mask = operation.arguments[18]
    if mask is None:
        return operation
    boolean = _boolean(mask)
    if boolean is None:
        return replace(operation, problem="its padding mask is not boolean")
    if isinstance(operation, ops.Attention):
        return replace(operation, key_padding_mask=boolean)
    return replace(operation, arguments=(*operation.arguments[:18], boolean, operation.arguments[19]))


def _sizes(weight: Ref) -> tuple[int, ...] | None:
    """Output channels and kernel sizes, where torch.compile says them."""
    value = weight.meta.get("example_value") if isinstance(weight, fx.Node) else None
    if value is None or value.dim() != 4 or not all(isinstance(size, int) for size in value.shape):
        return None
    return value.shape[0], value.shape[2], value.shape[3]


def _boolean(mask: Ref) -> fx.Node | None:
    """The boolean mask that a padding mask is, or that PyTorch's layers made one to be added from."""
    if not isinstance(mask, fx.Node):
        return None
    value = mask.meta.get("example_value")
    if value is not None and value.dtype == torch.bool:
        return mask
    # zeros_like(boolean, dtype=..).masked_fill_(boolean, -inf)
    if mask.target != "masked_fill_" or len(mask.args) != 3 or mask.args[2] != float("-inf"):
        return None
    zeros, boolean = mask.args[:2]
    if not isinstance(zeros, fx.Node) or not isinstance(boolean, fx.Node):
        return None
    if zeros.target is not torch.zeros_like or zeros.args[:1] != (boolean,) or len(zeros.users) != 1:
        return None
    written = any(_in_place(user) for node in (mask, boolean) for user in node.users if user is not mask)
    return None if written else _boolean(boolean)


def _constant(node: fx.Node) -> Any:
    """The number that a symbol of torch.compile stands for, which then is part of what was compiled for."""
    value = node.meta.get("example_value")
    return float(value) if isinstance(value, torch.SymFloat) else node


def _well_known(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's layers, which write to nothing but what ``inplace`` says."""
    from_torch = type(module).__module__.startswith("torch.nn.modules.")
    children = any(not type(m).__module__.startswith("torch.nn.modules.") for m in module.modules())
    return from_torch and not children and not _layers.has_hooks(module)


def _call_name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def _in_place(node: fx.Node) -> bool:
    name = _call_name(node)
    if any(schema.is_mutable for schema in _schemas(node.target)):
        return True
    if node.op == "call_method" and (name == "__setitem__" or name.startswith("__i")):
        return True
    module = getattr(node.target, "__module__", None)
    if module == _in_place_functions.__name__:
        return True
    if module in ("operator", "_operator"):
        return name in ("setitem", "delitem") or (name.startswith("i") and name not in _NOT_IN_PLACE)
    if (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None:
        return True
    given = _functions.bound(node.target, node.args, node.kwargs) if callable(node.target) else None
    return bool(given and given.get("inplace"))


_NOT_IN_PLACE = ("is_", "is_not", "index", "indexOf", "inv", "invert", "itemgetter")


def _from_known_package(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None)
    known = ("torch", "operator", "_operator", "builtins", "math", "styleforge")
    return isinstance(node.target, str) or module is None or str(module).split(".")[0] in known


def _schemas(target: Any) -> list[Any]:
    """The schemas of an operator from ``torch.ops``; none for anything else."""
    if isinstance(target, torch._ops.OpOverload):
        return [target._schema]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, name)._schema for name in target.overloads()]
    return []


def _changes_mode(node: fx.Node) -> bool:
    name = _call_name(node)
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True  # a whole graph, which may do anything
    return any(part in name for part in ("autocast", "grad_enabled", "_enter_", "_exit_", "inference_mode"))


# --- putting operators in -------------------------------------------------------------------------


def _replace(graph: fx.Graph, site: Site, replaced: dict[Ref, fx.Node]) -> None:
    nodes: list[Any] = [step.key for step in site.steps]
    last: fx.Node = nodes[-1]
    with graph.inserting_before(last):

        def value(reference: Ref) -> Any:
            if isinstance(reference, Attribute):
                return graph.get_attr(reference.path)
            return replaced.get(reference, reference) if isinstance(reference, fx.Node) else reference

        function, args = call_of(site)
        new = graph.call_function(function, tuple(value(a) for a in args))
    if isinstance(site, AttentionSite) and isinstance(site.operation, ops.Attention) and site.operation.pair:
        items = list(last.users)
        for item in items:
            if item.args[1] == 0:
                item.replace_all_uses_with(new)
                replaced[item] = new
        nodes += items
    else:
        last.replace_all_uses_with(new)
        replaced[last] = new
        new.meta = dict(last.meta)
    for node in reversed(nodes):
        graph.erase_node(node)


def _drop_bias(graph: fx.Graph, root: nn.Module, norm: fx.Node) -> None:
    """A transposed convolution that only a norm reads needs no bias: the norm takes it out again."""
    node = norm.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1 or _values(norm).count(node) != 1:
        return
    args: tuple[Any, ...]
    with graph.inserting_before(node):
        if node.op == "call_module":
            module: Any = root.get_submodule(str(node.target))
            plain = type(module) is nn.ConvTranspose2d and not _layers.has_hooks(module)
            if not plain or module.bias is None or len(node.args) != 1 or node.kwargs:
                return
            parameters = [graph.get_attr(f"{node.target}.{name}") for name in ("weight", "bias")]
            numbers = (module.stride, module.padding, module.output_padding, module.groups, module.dilation)
            args = (node.args[0], *parameters, *numbers)
        elif node.op == "call_function" and node.target in _functions.TRANSPOSED_CONVS:
            given = _functions.transposed_conv(node.args, dict(node.kwargs))
            if given is None or given[2] is None:
                return
            args = given
        else:
            return
        lists: list[Any] = [
            list(n) if isinstance(n, (tuple, list)) else [n, n] for n in (*args[3:6], args[7])
        ]
        new = graph.call_function(_calls.conv_transpose, (*args[:3], *lists[:3], args[6], lists[3]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def call_of(site: Site) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function that stands for a site, and its arguments, references among them."""
    if isinstance(site, FFNSite):
        return _calls.ffn, _ffn_arguments(site)
    if isinstance(site, AttentionSite):
        operation = site.operation
        if isinstance(operation, ops.EncoderLayer):
            return _attention.encoder_layer, operation.arguments
        return _attention.self_attention, (
            operation.input,
            operation.num_heads,
            operation.qkv_weight,
            operation.qkv_bias,
            operation.out_weight,
            operation.out_bias,
            operation.key_padding_mask,
            operation.is_causal,
            operation.sequence_first,
        )
    if isinstance(site, LastConvSite):
        conv = site.conv
        return _calls.reflect_conv, (site.input, conv.weight, conv.bias, conv_precision())
    activation = site.activation.name if site.activation is not None else "none"
    slope = site.activation.negative_slope if site.activation is not None else 0.01
    norm = site.norm
    if site.conv is None:
        return _calls.instance_norm, (
            site.input,
            norm.weight,
            norm.bias,
            site.residual,
            norm.eps,
            activation,
            slope,
            norm.unbatched,
        )
    padding, mode = padding_of(site)
    return _calls.conv_instance_norm, (
        site.input,
        site.conv.weight,
        site.conv.bias,
        norm.weight,
        norm.bias,
        site.residual,
        list(site.conv.stride),
        list(padding),
        mode,
        site.upsample,
        norm.eps,
        activation,
        slope,
        norm.unbatched,
        conv_precision(),
    )


def padding_of(site: NormSite) -> tuple[tuple[int, int], str]:
    """Padding and its mode, of the layer before the convolution where there is one."""
    assert site.conv is not None
    if site.pad is not None:
        return site.pad.padding, site.pad.padding_mode
    return site.conv.padding, site.conv.padding_mode


def _ffn_arguments(site: FFNSite) -> tuple[Any, ...]:
    drops: list[Any] = []
    for dropout in site.dropouts:
        drops += [0.0, False] if dropout is None else [dropout.probability, dropout.training]
    fc1, fc2 = site.fc1, site.fc2
    weights = (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return (site.input, *weights, site.residual, site.activation.name, *drops, matmul_precision())


def _ignore_weights(graph: fx.Graph, root: nn.Module) -> None:
    for node in with_unread_weights(graph, root):
        node.kwargs = {**node.kwargs, "need_weights": False}


def with_unread_weights(graph: fx.Graph, root: nn.Module) -> list[fx.Node]:
    """Calls of attention layers whose weights nobody reads: told so, they need not work them out."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_module"
        and isinstance(root.get_submodule(str(node.target)), nn.MultiheadAttention)
        and len(node.args) <= 4
        and node.kwargs.get("need_weights") is not False
        and node.users
        and all(_takes_output(user) for user in node.users)
    ]


def _takes_output(user: fx.Node) -> bool:
    """Whether it takes the first item of a pair; the second one of ``a, _ = pair`` does not count."""
    is_item = user.op == "call_function" and _call_name(user) == "getitem"
    return is_item and bool(user.args[1] == 0 or not user.users)
