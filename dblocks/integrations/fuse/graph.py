"""Puts the fused ops into a graph of torch.compile, where the graph says that they compute it.

Three forms are found, whatever module they come from: `norm(x) * (1 + scale) + shift`, with or
without the shift; `x + gate * branch`; and the second followed by the first. Norms are PyTorch's
layer and RMS norm, and an RMS norm written out. The match is of operations, constants and shapes,
so what is replaced is the same function up to rounding; all else stays.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from dblocks.integrations.fuse import lowered
from dblocks.integrations.fuse.nodes import (
    MOVES,
    acts_beyond_its_result,
    arguments,
    broadcasts,
    is_channels,
    operands,
    operation,
    uncast,
    value,
    without_one,
)
from dblocks.ops._dispatch import FLOATS, Impl, Norm

LAYER = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
RMS = ("input", "normalized_shape", "weight", "eps")
MEAN = ("input", "dim", "keepdim", "dtype")


class GraphReport(NamedTuple):
    """What a pass over a graph did."""

    sites: Counter[str]
    """Modulated norms ("modulation") and gated sums ("gate") that were replaced."""
    ops: Counter[str]
    """The ops that compute them now; residual_adaln takes the place of two sites, or of one and
    a plain sum."""
    left: list[str]
    """Modulated norms that stay, a line for each: what they are and why."""


class NormNode(NamedTuple):
    """A norm, read from its node or, written out, from several."""

    x: Node
    weight: Any
    bias: Any
    norm: Norm
    eps: float


OPS = {
    lowered.modulated: "adaln",
    lowered.gated: "gated_residual",
    lowered.gated_modulated: "residual_adaln",
}


def fuse_graph(module: GraphModule, impl: Impl = "auto") -> GraphReport:
    """Rewrites the graph of `module` and those inside it, in place."""
    report = GraphReport(Counter(), Counter(), [])
    for part in module.modules():
        if isinstance(part, GraphModule):
            _fuse(part.graph, impl, report)
            part.recompile()
    return report


def _fuse(graph: Graph, impl: Impl, report: GraphReport) -> None:
    for rule in (_modulation, _scaling, _gate):
        for node in list(graph.nodes):
            if node.users:
                rule(graph, node, impl, report)
        _drop_unused(graph)
    for node in list(graph.nodes):
        if node.target is lowered.modulated:
            _merge(graph, node)
    _drop_unused(graph)
    for node in graph.nodes:
        if node.target in OPS:
            report.ops[OPS[node.target]] += 1
        elif (why := _why_left(node)) is not None:
            report.left.append(f"{node.name}: {why}")


def _drop_unused(graph: Graph) -> None:
    """Removes what only replaced nodes used; nothing that may act beyond its result."""
    for node in reversed(graph.nodes):
        if not node.users and (operation(node) is not None):
            graph.erase_node(node)


def _modulation(graph: Graph, node: Node, impl: Impl, report: GraphReport) -> None:
    for product, shift in operands(node, "add") if operation(node) == "add" else []:
        for normed, factor in operands(product, "mul"):
            norm, rows = norm_of(normed), value(node)
            if norm is None or rows is None or not broadcasts(shift, rows):
                continue
            full = value(shift).shape == rows.shape  # pyright: ignore
            if full and value(factor) is not None and value(factor).shape != rows.shape:  # pyright: ignore
                continue  # a residual sum of a scaled norm
            if _replace(graph, node, norm, shift, factor, impl, report):
                return


def _scaling(graph: Graph, node: Node, impl: Impl, report: GraphReport) -> None:
    for normed, factor in operands(node, "mul") if operation(node) == "mul" else []:
        norm = norm_of(normed)
        if norm is not None and _replace(graph, node, norm, None, factor, impl, report):
            return


def _replace(
    graph: Graph, node: Node, norm: NormNode, shift: Any, factor: Any, impl: Impl, report: Any
) -> bool:
    rows, x = value(node), value(norm.x)
    if rows is None or x is None or rows.shape != x.shape or rows.dtype not in FLOATS:
        return False
    scale = without_one(factor)
    if scale is None or not broadcasts(factor, x):
        return False
    if not _undisturbed(node, {norm.x, norm.weight, norm.bias, shift, *scale.sources}):
        return False
    with graph.inserting_before(node):
        made = graph.call_function(
            lowered.modulated,
            (norm.x, shift, scale.make(), *norm[1:], rows.dtype, impl),
        )
    _put(node, made)
    report.sites["modulation"] += 1
    return True


def _gate(graph: Graph, node: Node, impl: Impl, report: GraphReport) -> None:
    rows = value(node)
    if operation(node) != "add" or rows is None or rows.ndim < 2 or rows.dtype not in FLOATS:
        return
    for x, product in operands(node, "add"):
        if value(x) is None or value(x).shape != rows.shape:  # pyright: ignore
            continue
        if norm_of(product) is not None:
            continue  # a plain sum of x and a norm with a weight
        for gate, branch in operands(product, "mul"):
            if _rotary(x, gate, rows):
                continue
            if not _is_gate(gate, branch, rows) or value(x).dtype not in FLOATS:  # pyright: ignore
                continue
            if not _undisturbed(node, {x, branch, gate}):
                continue
            with graph.inserting_before(node):
                made = graph.call_function(lowered.gated, (x, branch, gate, rows.dtype, impl))
            _put(node, made)
            report.sites["gate"] += 1
            return


def _rotary(x: Any, gate: Any, rows: Tensor) -> bool:
    """Whether a sum is of rotary positions: x * cos + rotated * sin."""
    g = value(gate)
    like = [value(f) for pair in operands(x, "mul") for f in pair]
    alike = any(g is not None and f is not None and f.shape == g.shape for f in like)
    return bool(like) and (rows.ndim == 4 or alike)


def _is_gate(gate: Any, branch: Any, rows: Tensor) -> bool:
    """Whether one factor is a gate: the same for several tokens, or a part of a modulation."""
    g, b = value(gate), value(branch)
    if g is None or b is None or b.shape != rows.shape or b.dtype not in FLOATS:
        return False
    if not broadcasts(gate, rows) or g.device != b.device:
        return False
    if g.ndim == 1 or g.shape[-2] == 1 < rows.shape[-2]:
        return True
    per_token = operation(uncast(gate)) in MOVES and operation(uncast(branch)) not in MOVES
    return g.ndim == rows.ndim == 3 and (per_token or rows.shape[-2] == 1)


def _merge(graph: Graph, node: Node) -> None:
    """One op of a residual sum and the modulated norm that follows it."""
    total = uncast(node.args[0], up_only=True)
    rows = value(total)
    places = {n: i for i, n in enumerate(graph.nodes)}
    if rows is None or any(places[user] < places[node] for user in total.users):
        return
    if total.target is lowered.gated:
        x, branch, gate = total.args[:3]
    elif operation(total) == "add" and not total.kwargs and len(total.args) == 2:
        (x, branch), gate = total.args, None
        if any(value(a) is None or value(a).shape != rows.shape for a in (x, branch)):  # pyright: ignore
            return
    else:
        return
    if rows.dtype not in FLOATS or not _undisturbed(
        node, {x, branch, gate, *cast(Any, node.args[1:])}
    ):
        return
    with graph.inserting_before(node):
        both = graph.call_function(
            lowered.gated_modulated, (x, branch, gate, rows.dtype, *node.args[1:])
        )
        both.meta["stack_trace"] = node.meta.get("stack_trace")
        x_new = graph.call_function(operator.getitem, (both, 0))
        y = graph.call_function(operator.getitem, (both, 1))
    if node.args[0] is not total:  # a conversion before the norm, which the op makes itself
        node.args = (total, *node.args[1:])
    _put(node, y)
    _put(total, x_new)


def _put(node: Node, made: Node) -> None:
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _undisturbed(last: Node, read: set[Any]) -> bool:
    """Whether `last` may be computed at once from the nodes that are `read`.

    From the first node that it takes the place of on, nothing may change tensors in place or the
    mode of the others.
    """
    derived, replaced, waiting = set(), {last}, [last]
    for node in last.graph.nodes:
        if node not in read and any(i in read or i in derived for i in node.all_input_nodes):
            derived.add(node)
    while waiting:
        new = [n for n in waiting.pop().all_input_nodes if n in derived and n not in replaced]
        replaced.update(new)
        waiting.extend(new)
    node, began = next(iter(last.graph.nodes)), False
    while node is not last:
        if began and acts_beyond_its_result(node):
            return False
        began = began or node in replaced
        node = node.next
    return True


def norm_of(node: Any) -> NormNode | None:
    """The norm over the last dimension that a node is, with its weight and bias."""
    node, rows = uncast(node), value(node)
    kind = operation(node)
    if rows is None or kind is None:
        return None
    if kind == "layer_norm":
        x, shape, weight, bias, eps, *_ = arguments(node, LAYER)
        return _norm(x, shape, weight, bias, "layer", 1e-5 if eps is None else eps)
    if kind == "rms_norm":
        x, shape, weight, eps = arguments(node, RMS)
        return _norm(x, shape, weight, None, "rms", eps)
    for inner, channels in operands(node, kind) if kind in ("add", "mul") else []:
        if is_channels(channels, rows) and channels.op in ("placeholder", "get_attr"):
            norm = norm_of(inner)
            if norm is None or norm.bias is not None:
                continue
            if kind == "add":
                return norm._replace(bias=channels)
            if norm.weight is None:
                return norm._replace(weight=channels)
    return _written_out(node) if kind == "mul" else None


def _norm(x: Any, shape: Any, weight: Any, bias: Any, norm: Norm, eps: Any) -> NormNode | None:
    rows = value(x)
    if rows is None or rows.ndim < 2 or tuple(shape) != (rows.shape[-1],):
        return None
    below = uncast(x, up_only=True)
    weight, bias = uncast(weight, up_only=True), uncast(bias, up_only=True)
    given = [c for c in (weight, bias) if c is not None]
    if not isinstance(eps, float) or not all(is_channels(c, rows) for c in given):
        return None
    return NormNode(below, weight, bias, norm, eps)


def _written_out(node: Node) -> NormNode | None:
    """x * rsqrt(mean(x^2) + eps)."""
    for x, root in operands(node, "mul"):
        if operation(root) != "rsqrt" or value(x) is None:
            continue
        for mean, eps in operands(root.args[0], "add"):
            mean = uncast(mean)
            if operation(mean) != "mean" or not isinstance(eps, float):
                continue
            square, dim, keepdim, dtype = arguments(mean, MEAN)
            dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
            if dim not in (-1, value(x).ndim - 1) or keepdim is not True or dtype is not None:  # pyright: ignore
                continue
            squared = _squared(square)
            if squared is None:
                continue
            below = uncast(x, up_only=True)
            if uncast(squared, up_only=True) is below and value(below).ndim >= 2:  # pyright: ignore
                return NormNode(below, None, None, "rms", eps)
    return None


def _squared(node: Any) -> Any:
    """x, where a node is x^2."""
    if operation(node) == "square":
        return node.args[0]
    if operation(node) == "pow" and len(node.args) == 2 and node.args[1] in (2, 2.0):
        return node.args[0]
    if operation(node) == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _why_left(node: Node) -> str | None:
    """Why a product of a norm with a modulation stays; None for every other node."""
    rows = value(node)
    for normed, factor in operands(node, "mul") if operation(node) == "mul" else []:
        norm = norm_of(normed)
        if norm is None or rows is None or is_channels(factor, rows):
            continue
        if value(factor) is None or not broadcasts(factor, rows):
            continue
        if rows.ndim == 4 and any(
            operation(uncast(other)) == "mul"
            for user in node.users
            for other in user.args
            if other is not node
        ):
            continue  # rotary positions: x * cos + rotated * sin
        if without_one(factor) is None:
            return "the factor of the norm is not 1 + scale"
        return "shapes, dtypes or a change in place between its steps"
    return None
