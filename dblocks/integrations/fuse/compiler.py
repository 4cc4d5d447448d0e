"""`torch.compile(model, backend="dblocks")`: the fused ops in the graph of any model."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from dblocks.integrations.fuse.graph import fuse_graph
from dblocks.ops._dispatch import IMPLS

log = logging.getLogger(__name__)


def compiler(
    module: GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend of torch.compile that puts the fused ops into a graph and passes it on.

    It replaces `norm(x) * (1 + scale) + shift` by adaln, `x + gate * branch` by gated_residual and
    the second followed by the first by residual_adaln, in any model; see `fuse_graph`. The model
    itself, its classes, hooks and state do not change.

    Args:
        module: the graph.
        example_inputs: of the graph.
        options: `inner` is the backend that compiles the graph, by name ("inductor"; "eager" runs
            it as it is) or as a function; `impl` is as in `dblocks.functional.adaln`; `report` is
            called with the `GraphReport` of each graph. All others go to `inner`.

    Raises:
        ValueError: for an unknown `impl` or option.
        TypeError: if `report` is not a function.
    """
    options = dict(options or {})
    inner, impl = options.pop("inner", "inductor"), options.pop("impl", "auto")
    report = options.pop("report", None)
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if not (report is None or callable(report)):
        raise TypeError(f"report must be a function or None, got {type(report).__name__}")
    found = fuse_graph(module, impl)
    log.info("fused %s by %s; left %s", dict(found.sites), dict(found.ops), found.left)
    if report is not None:
        report(found)
    more = _options_of(inner, options)
    inner = torch._dynamo.lookup_backend(inner) if isinstance(inner, str) else inner
    return inner(module, example_inputs, **more)


def _options_of(inner: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments by which a backend takes options."""
    if not options:
        return {}
    if inner not in ("inductor", "eager"):
        return {"options": options}
    inductor = importlib.import_module("torch._inductor")
    known = set(inductor.list_options()) if inner == "inductor" else set()
    unknown = sorted(name for name in options if name.replace("-", "_") not in known)
    if unknown:
        raise ValueError(
            f"options must be 'inner', 'impl', 'report' or those of inner={inner!r}, got "
            f"{', '.join(map(repr, unknown))}; leave out what is not read"
        )
    return {"config_patches": {name.replace("-", "_"): value for name, value in options.items()}}
