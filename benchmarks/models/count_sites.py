"""Counts modulated norms and gated residual sums of a model, from the data flow of one call.

It does not use the graph of torch.compile or code of the pass that rewrites it: an ordinary call is
traced, operation by operation below autograd, and tensors carry marks. A norm marks its result,
`1 + s` marks its result, and a product with both marks is a modulated norm; a product with a factor
that several tokens share (or with a part of a wider tensor) marks its result, and a sum of a marked
and an unmarked tensor of the same shape is a gated residual sum. Only sites that the outputs depend
on are counted, since a graph does not compute the others.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NORM, ROOT, MEAN, PLUS, SCALED, GATED, PART, PARAM = (
    "norm", "root", "mean", "1 + s", "modulated", "gated", "part", "parameter",
)  # fmt: skip

# Operations that only move values, and operations that take a part of a tensor.
MOVES = {
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose",
    "t", "alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh", "repeat", "index",
    "index_select", "gather", "_reshape_alias", "unfold", "copy", "native_dropout",
    "repeat_interleave", "where", "cat", "stack",
}  # fmt: skip
PARTS = {"split", "split_with_sizes", "unbind", "select", "slice", "chunk", "as_strided"}
SHAPES = {"tanh", "sigmoid"}  # largest number of dimensions of a gate


class SiteCount(TorchDispatchMode):
    """Counts while it is active; `sites` returns the counts."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._found_sites: list[tuple[str, str, int]] = []
        self._sources: dict[int, set[int]] = {}  # storage -> the ones it was made from
        self._alive: list[Tensor] = []
        self._marks: dict[int, tuple[Tensor, frozenset[str]]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._mark(tensor, {PARAM})

    def sites(self, outputs: Sequence[Tensor]) -> Counter[tuple[str, str]]:
        """The sites that the outputs depend on, by kind ("modulation", "gate") and place."""
        reached, new = set(), {_storage(y) for y in outputs}
        while new:
            reached |= new
            new = {s for one in new for s in self._sources.get(one, ())} - reached
        return Counter((kind, where) for kind, where, made in self._found_sites if made in reached)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = getattr(func, "_schema", None)
        self._remember(tree_leaves((args, kwargs)), tree_leaves(result))
        name = schema.name.partition("::")[2].removesuffix("_") if schema else ""
        marks = self._after(name, args, kwargs or {}, result)
        if marks:
            results = result if isinstance(result, (tuple, list)) else (result,)
            for tensor in results[:1] if name in ("native_layer_norm", NORM) else results:
                self._mark(tensor, marks)
        return result

    def _remember(self, sources: list[Any], results: list[Any]) -> None:
        used = {_storage(t) for t in sources if isinstance(t, Tensor)}
        self._alive += [t for t in results if isinstance(t, Tensor)]
        for tensor in results:
            if isinstance(tensor, Tensor):
                self._sources.setdefault(_storage(tensor), set()).update(used)

    def _mark(self, tensor: Any, marks: set[str]) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            self._marks[id(tensor)] = (tensor, frozenset(marks))

    def of(self, tensor: Any) -> frozenset[str]:
        return self._marks[id(tensor)][1] if id(tensor) in self._marks else frozenset()

    def _after(self, name: str, args: Sequence[Any], kwargs: Any, result: Any) -> set[str]:
        """The marks of a result."""
        if name in ("native_layer_norm", "_fused_rms_norm"):
            return {NORM}
        if name in MOVES or name in PARTS:
            sources = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            sources = [t for t in sources if t.is_floating_point()]
            marks = set(self.of(sources[0])) if sources else set()
            for other in sources[1:]:
                marks &= self.of(other)
            first = tree_leaves(result)[0] if tree_leaves(result) else None
            whole = sources and isinstance(first, Tensor) and first.numel() >= sources[0].numel()
            return marks | ({PART} if name in PARTS and not whole else set())
        if name in SHAPES:
            return set(self.of(args[0]) & {PART})
        if name == "mean":
            return {MEAN}
        if name in ("rsqrt", "sqrt"):
            return {ROOT} if MEAN in self.of(args[0]) else set()
        if name == "reciprocal":
            return set(self.of(args[0]) & {ROOT})
        if name in ("mul", "div") and isinstance(result, Tensor):
            return self._product(args[0], args[1], result)
        if name == "add" and isinstance(result, Tensor) and kwargs.get("alpha", 1) == 1:
            return self._sum(args[0], args[1], result)
        if name == "addcmul" and kwargs.get("value", 1) == 1:
            marks = self._product(args[1], args[2], result)
            if GATED in marks and args[0].shape == result.shape:
                self._found("gate", result)
            return marks - {GATED}
        return set()

    def _product(self, a: Any, b: Any, result: Tensor) -> set[str]:
        for x, factor in ((a, b), (b, a)):
            marks, other = self.of(x), self.of(factor)
            if ROOT in other and factor.shape[-1] == 1 < result.shape[-1]:
                return {NORM}
            if NORM in marks and PARAM in other:
                return {NORM}
            if NORM in marks and PLUS in other and _over_channels(factor, result):
                self._found("modulation", result)
                return {SCALED}
        for gate, branch in ((a, b), (b, a)):
            if _over_channels(gate, result) and _full(branch, result) and result.ndim >= 2:
                few = gate.numel() < result.numel()
                if few or (PART in self.of(gate) and PART not in self.of(branch)):
                    return {GATED}
        return set()

    def _sum(self, a: Any, b: Any, result: Tensor) -> set[str]:
        for x, other in ((a, b), (b, a)):
            if _is_number(other):
                one = float(other) == 1.0
                marks = self.of(x) & {MEAN, PARAM, PART}
                return set(marks | {PLUS}) if one and PARAM not in marks else set(marks)
            if NORM in self.of(x) and PARAM in self.of(other):
                return {NORM}
            full = _full(other, result) and _full(x, result)
            if full and GATED in self.of(x) and not {GATED, SCALED} & self.of(other):
                self._found("gate", result)
                return set()
        both = self.of(a) & self.of(b)
        table = {PART} if PARAM in self.of(a) | self.of(b) and PARAM not in both else set()
        return set(both & {PARAM}) | (table & (self.of(a) | self.of(b)))

    def _found(self, kind: str, result: Tensor) -> None:
        self._found_sites.append((kind, place(), _storage(result)))


def place() -> str:
    """The running function of diffusers, with its file."""
    frames = [f for f in traceback.extract_stack() if "/diffusers/" in f.filename]
    return f"{frames[-1].filename.rpartition('/')[2]}: {frames[-1].name}" if frames else "?"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.ndim == 0)


def _full(x: Any, result: Tensor) -> bool:
    return isinstance(x, Tensor) and x.shape == result.shape and x.is_floating_point()


def _over_channels(x: Any, result: Tensor) -> bool:
    return (
        isinstance(x, Tensor)
        and 1 <= x.ndim <= result.ndim
        and x.shape[-1] == result.shape[-1] > 1
        and x.is_floating_point()
    )
