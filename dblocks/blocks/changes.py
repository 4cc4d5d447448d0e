"""Notices what was changed in a network since it was divided into blocks or last looked at.

Blocks run parts of some layers and read weights of heads and norms: what is put on or in place of a
module that is not called would be left out without a word. Whether a network was changed is seen
from its modules, their classes, forwards and hooks, and from the entries of its config; the numbers
of modules, such as dropout rates, are read in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, ref

from torch import nn

Row: TypeAlias = tuple[Any, ...]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
RECORDS = ("transformers.",)
SHARDS = ("torch.distributed.",)  # whose hooks the parts of a layer run within
OWN = ("dblocks.",)  # which count bytes of layers, or move them
UNCOUNTED = (*RECORDS, *SHARDS)
# Keys of a config that do not change what a model computes in evaluation mode.
IGNORED = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict",
    "return_dict_in_generate", "id2label", "label2id", "problem_type", "finetuning_task",
    "task_specific_params", "torchscript", "gradient_checkpointing", "attn_implementation",
    "quantization_config", "name_or_path", "use_return_dict", "output_attentions",
    "output_hidden_states", "initializer_range", "initializer_factor", "bos_token_id",
    "eos_token_id",
}  # fmt: skip
IGNORED_PARTS = ("dropout", "pdrop")  # of such keys
PLAIN = {bool, int, float, str, type(None)}
"""Types of entries of a config that are compared as they are."""
LISTS = {dict, list, tuple}
"""Types that may be changed in place, and are compared by their text."""


class Seen(NamedTuple):
    """What identifies the code that a model runs, and its parameters."""

    modules: list[Row]
    parameters: list[int]


_SEEN: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""What was seen of a network; not an attribute, so that no copy or file of it holds it."""


def remember(holder: nn.Module, seen: Any) -> None:
    """Stores what was seen when `holder` was verified."""
    _SEEN[holder] = seen


def remembered(holder: nn.Module) -> Any:
    """What `remember` stored; None for a holder that was copied, unpickled or never verified."""
    return _SEEN.get(holder)


def replacement(module: nn.Module) -> Any:
    """What was put in place of a module's forward; None for its class' own.

    transformers 4 leaves a module's own forward among its attributes after it recorded outputs.
    """
    put = vars(module).get("forward")
    function, owner = getattr(put, "__func__", None), getattr(put, "__self__", None)
    own = forward_of(type(module))
    if own is None:  # scripted: it keeps its own among them when it is first looked up
        return None
    return None if owner is module and function is own else put


def forward_of(kind: type) -> Any:
    """The forward of a class of modules; None for that of a scripted module, which has none."""
    return getattr(kind, "forward", None)


def runs_more(module: nn.Module, uncounted: Sequence[str] = RECORDS) -> bool:
    """Whether a call of a module runs more than its class' forward: hooks, or a replacement.

    Hooks of the `uncounted` libraries do not count: those of transformers only record outputs.
    """
    return replacement(module) is not None or any(
        hooks_of(getattr(module, name), uncounted) for name in HOOKS
    )


def hooks_of(hooks: Mapping[int, Any], uncounted: Sequence[str]) -> list[int]:
    """The keys of the hooks that count; no key is used twice."""
    return [
        key
        for key, hook in hooks.items()
        if not (getattr(hook, "__module__", None) or "").startswith(tuple(uncounted))
    ]


def follow_changes_(
    holder: nn.Module, models: Sequence[nn.Module], take: Callable[[Seen | None, Seen], None]
) -> bool:
    """Whether models were changed since the last call; `take` gets what was and is seen of them."""
    before, now = remembered(holder), seen_of(*models)
    if before == now:
        return False
    take(before, now)
    remember(holder, seen_of(*models))
    return True


def seen_of(*models: nn.Module) -> Seen:
    """What models are made of, in an order that depends on them alone."""
    rows: list[Row] = []
    parameters: list[int] = []
    met, pending, sharded = {id(model) for model in models}, [*reversed(models)], False
    configs: set[int] = set()
    while pending:
        module = pending.pop()
        row, config = row_of(module), vars(module).get("config")
        if config is not None and id(config) not in configs:
            configs.add(id(config))
            row = (*row[:-1], settings_of(module), row[-1])
        rows.append(row)
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
    return ref(module), kind, forward_of(kind), put, keys


def is_ignored(key: str) -> bool:
    """Whether an entry of a config says nothing about what a model computes."""
    return key in IGNORED or any(part in key for part in IGNORED_PARTS)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The entries of a module's config that are numbers, texts, lists or such configs, by name."""
    return _entries_of(vars(module).get("config"))


def _entries_of(config: Any) -> dict[str, Any]:
    found = {}
    for name, value in getattr(config, "__dict__", {}).items():
        if name.startswith("_") or is_ignored(name):
            continue
        if type(value) in PLAIN:
            found[name] = value
        elif type(value) in LISTS:
            found[name] = repr(value)
        elif hasattr(value, "to_dict"):  # a config of a part, such as of the vision model
            found[name] = _entries_of(value)
    return found


def check_called(model: Any, layers: Iterable[Sequence[nn.Module]]) -> None:
    """Raises for hooks and forwards that would not run, on modules that are read or taken apart.

    These are modules without a forward, such as norms, the embedding and output head of the
    target, and what the network names by `by_parts`.

    Args:
        model: a network.
        layers: the layers of each block.
    """
    target, by_parts = model.target, getattr(model, "by_parts", None)
    head = getattr(getattr(target, "output_head", None), "linear", None)
    read = [getattr(target, "embedding", None), head]
    if by_parts is not None:
        read += (module for held in layers for module in by_parts(held))
    uncalled = {id(module) for module in read}
    for name, module in model.named_modules():
        if id(module) not in uncalled and _can_be_called(module):
            continue
        if name and runs_more(module, (*UNCOUNTED, *OWN)):
            raise ValueError(
                f"{name} must have no hooks and no replaced forward, since it is "
                f"not called: its weights are read, or its parts called, got some on this "
                f"{type(module).__name__}; remove them, or put them on what it consists of, or is "
                "part of"
            )


def _can_be_called(module: nn.Module) -> bool:
    """Whether a call of a module runs something; torch.compile gives its wrapper a forward."""
    return forward_of(type(module)) is not nn.Module.forward or "_orig_mod" in module._modules


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
