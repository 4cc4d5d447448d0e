"""Notices what was changed in a model since it was converted or last looked at.

A converted model runs the parts of layers, and reads weights of heads: what is put on or in place
of a module that is not called would be left out without a word. Whether a model was changed is
seen from its modules, their classes, forwards and hooks; their numbers, such as dropout rates, are
read in each call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch import nn

from dblocks.integrations.convert.plain import HOOKS, RECORDS, SHARDS, hooks_of, replacement

Row: TypeAlias = tuple[Any, ...]
UNCOUNTED = (*RECORDS, *SHARDS)


class Seen(NamedTuple):
    """What identifies the code that a model runs, and its parameters."""

    modules: list[Row]
    parameters: list[int]


_SEEN: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""What was seen of a converted model; not an attribute, so that no copy or file of it holds it."""


def remember(holder: nn.Module, seen: Any) -> None:
    """Stores what was seen when `holder` was verified."""
    _SEEN[holder] = seen


def remembered(holder: nn.Module) -> Any:
    """What `remember` stored; None for a holder that was copied, unpickled or never verified."""
    return _SEEN.get(holder)


def seen_of(model: nn.Module) -> Seen:
    """What a model is made of, in an order that depends on it alone."""
    rows: list[Row] = []
    parameters: list[int] = []
    met, pending, sharded = {id(model)}, [model], False
    while pending:
        module = pending.pop()
        rows.append(row_of(module))
        sharded = sharded or is_sharded(module)
        parameters.extend(map(id, module._parameters.values()))
        for child in module._modules.values():
            if child is not None and id(child) not in met:
                met.add(id(child))
                pending.append(child)
    # FSDP puts others in their places around each call.
    return Seen(rows, [] if sharded else parameters)


def rows_of(modules: Iterable[ref[nn.Module]]) -> list[Row | None]:
    """A row of each module, None for one that is no more."""
    alive = (reference() for reference in modules)
    return [None if module is None else row_of(module) for module in alive]


def row_of(module: nn.Module) -> Row:
    """What decides what a call of the module runs, beside its children."""
    kind: Any = type(module)
    if is_sharded(module):
        kind = kind.__mro__[2]  # after FSDP's two
    own = vars(module)
    put = id(replacement(module) if "forward" in own else None)
    found = (own[name] for name in HOOKS if own[name])
    keys = tuple(key for hooks in found for key in hooks_of(hooks, UNCOUNTED))
    return ref(module), kind, kind.forward, put, keys


def children_of(model: nn.Module, names: Iterable[str], others: Iterable[str]) -> list[Row]:
    """What the modules that hold the layers hold, without the layers `others`.

    A view of one block has shallow copies of these, which do not see what is put in their places.
    """
    left, rows = set(others), []
    for path in sorted({"", *(above for name in names for above in _above(name))}):
        module = model.get_submodule(path)
        prefix = f"{path}." if path else ""
        held = ((n, c) for n, c in module._modules.items() if prefix + n not in left)
        children = tuple((n, None if c is None else ref(c)) for n, c in held)
        rows.append((ref(module), prefix, frozenset(left), children))
    return rows


def replaced_child(rows: Iterable[Row]) -> str | None:
    """The path of a child that is not as when `rows` were taken by `children_of`; None if none."""
    for container, prefix, left, before in rows:
        module = container()
        if module is None:
            continue
        then = {name: child and child() for name, child in before}
        now = {n: c for n, c in module._modules.items() if prefix + n not in left}
        for name in (*then, *now):
            if then.get(name) is not now.get(name):
                return prefix + name
    return None


def vocabularies(model: nn.Module) -> list[int]:
    """The sizes of the embeddings, which are changed in place where tokens are added."""
    return [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]


def _above(path: str) -> Iterable[str]:
    while path := path.rpartition(".")[0]:
        yield path


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on the module itself."""
    return hasattr(type(module), "unshard")


def changed(model: nn.Module, before: list[Row], now: list[Row]) -> dict[str, nn.Module]:
    """The modules of `now` that were not or otherwise in `before`, by name."""
    known = {id(row[0]()): row for row in before}
    rows = {id(row[0]()): row for row in now}
    return {
        name: module
        for name, module in model.named_modules()
        if known.get(id(module)) != rows.get(id(module))
    }
