"""Reading a graph of torch.compile: which operation a node is, and of what."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.nn import functional as F

SHORT = (torch.float32, torch.bfloat16, torch.float16)  # what the ops compute in float32

# A node's target, a function or the name of a method, and the operation that it is.
OPERATIONS: dict[Any, str] = {
    operator.add: "add", torch.add: "add", "add": "add", "__add__": "add", "__radd__": "add",
    operator.mul: "mul", torch.mul: "mul", "mul": "mul", "__mul__": "mul", "__rmul__": "mul",
    operator.pow: "pow", torch.pow: "pow", "pow": "pow", "square": "square",
    torch.square: "square", "mean": "mean", torch.mean: "mean",
    "rsqrt": "rsqrt", torch.rsqrt: "rsqrt",
    F.layer_norm: "layer_norm", torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm", torch.rms_norm: "rms_norm",
    "to": "cast", "float": "cast", "half": "cast", "bfloat16": "cast", "type_as": "cast",
    "type": "cast",
    operator.getitem: "view", "unsqueeze": "view", torch.unsqueeze: "view", "view": "view",
    "reshape": "view", torch.reshape: "view", "expand": "view", "contiguous": "view",
    "flatten": "view", torch.flatten: "view", "squeeze": "view", torch.squeeze: "view",
    "permute": "view", "transpose": "view",
    "repeat": "move", "repeat_interleave": "move", torch.repeat_interleave: "move",
    "index_select": "move", torch.index_select: "move", "gather": "move", torch.gather: "move",
    torch.where: "where",
}  # fmt: skip
IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift, operator.iconcat, operator.setitem, operator.delitem,
}  # fmt: skip
MOVES = ("view", "move", "where")  # numbers in another place
CONTEXTS = ("_enter", "_exit", "_set_grad", "set_grad")  # autocast and other modes begin or end


def value(node: Any) -> Tensor | None:
    """The example of a node's result, where that is a tensor."""
    found = node.meta.get("example_value") if isinstance(node, Node) else None
    return found if isinstance(found, Tensor) else None


def operation(node: Any) -> str | None:
    """What a node computes, in a word; None for all that this pass does not read."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    try:
        return OPERATIONS.get(node.target)
    except TypeError:  # no hash
        return None


def operands(node: Node, kind: str) -> list[tuple[Any, Any]]:
    """Both orders of the two arguments of a commutative operation, or [] where it is another."""
    node = uncast(node)
    if operation(node) != kind or node.kwargs or len(node.args) != 2:
        return []
    a, b = node.args
    return [(a, b), (b, a)]


def uncast(node: Any, *, up_only: bool = False) -> Any:
    """The node below conversions between dtypes that the ops compute in float32 anyway.

    With `up_only`, those that lose nothing.
    """
    while operation(node) == "cast":
        after, before = value(node), value(node.args[0])
        if after is None or before is None or after.device != before.device:
            break
        if after.dtype != before.dtype:
            if after.dtype not in SHORT or before.dtype not in SHORT:
                break
            if up_only and torch.promote_types(after.dtype, before.dtype) != after.dtype:
                break
        node = node.args[0]
    return node


def acts_beyond_its_result(node: Node) -> bool:
    """Whether a node may change a tensor in place, or the mode in which later ones run."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    if isinstance(node.target, HigherOrderOperator) or node.target in IN_PLACE:
        return True
    if node.kwargs.get("inplace") or "out" in node.kwargs or _changes_arguments(node):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = name.endswith("_") and not name.endswith("__")
    return changes or name.startswith(CONTEXTS)


def _changes_arguments(node: Node) -> bool:
    """Whether a registered op changes one, or `inplace` is given by its position."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target._schema.is_mutable
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    place = None if isinstance(target, str) else _place_of_inplace(target)
    return place is not None and len(node.args) > place and node.args[place] is not False


@lru_cache(maxsize=1024)
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of C
        return None
    return names.index("inplace") if "inplace" in names else None


def arguments(node: Node, names: tuple[str, ...]) -> list[Any]:
    """The arguments of a call, in the order of their names; None where there is none."""
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given.get(name) for name in names]


def broadcasts(node: Any, rows: Tensor) -> bool:
    """Whether a node is a modulation of `rows`: floating, over D, of no other shape."""
    m = value(node)
    if m is None or not m.is_floating_point() or m.ndim == 0 or m.ndim > rows.ndim:
        return False
    if m.device != rows.device or m.shape[-1] != rows.shape[-1]:
        return False
    sizes = zip(reversed(m.shape), reversed(rows.shape), strict=False)
    return all(a == 1 or a == b for a, b in sizes)


def is_channels(node: Any, rows: Tensor) -> bool:
    """Whether a node is the weight or bias of a norm of `rows`."""
    w = value(node)
    return w is not None and w.ndim == 1 and w.shape == rows.shape[-1:] and w.is_floating_point()


class Scale(NamedTuple):
    """How the node of a scale is made, and of which nodes."""

    make: Callable[[], Node]
    sources: list[Node]


def without_one(factor: Any) -> Scale | None:
    """The scale, where `factor` is 1 + scale, also moved; None elsewhere."""
    for one, scale in operands(factor, "add") if operation(factor) == "add" else []:
        if type(one) in (int, float) and one == 1 and value(scale) is not None:
            return Scale(lambda made=scale: made, [scale])
    kind = operation(factor)
    if kind not in (*MOVES, "cast"):
        return None
    # torch.where(mask, a, b) has two sources; all else has one, which is its first argument.
    chosen = kind == "where"
    if chosen and (factor.kwargs or len(factor.args) != 3):
        return None
    sources = factor.args[1:] if chosen else factor.args[:1]
    below = [None if value(source) is None else without_one(source) for source in sources]
    scales = [scale for scale in below if scale is not None]
    if not scales or len(scales) < len(below):
        return None

    def again() -> Node:
        made = [scale.make() for scale in scales]
        args = (factor.args[0], *made) if chosen else (*made, *factor.args[1:])
        with factor.graph.inserting_after(factor):
            node = factor.graph.create_node(factor.op, factor.target, args, factor.kwargs)
        node.meta = dict(factor.meta)
        return node

    return Scale(again, [source for scale in scales for source in scale.sources])
