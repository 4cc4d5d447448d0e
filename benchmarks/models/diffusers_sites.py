"""Checks `torch.compile(model, backend="dblocks")` on each transformer of diffusers.

    python -m benchmarks.models.diffusers_sites               classes without a row python -m
    benchmarks.models.diffusers_sites Flux Wan      classes with these prefixes, again python -m
    benchmarks.models.diffusers_sites --table       writes the table into docs/fuse.md

For a small instance of each class, on the CPU in float32: the number of modulated norms and gated
residual sums found by an independent count in an ordinary call (`count_sites`), the number that run
as fused ops, and the errors of outputs and gradients of all parameters relative to the plain model.
Each class runs in its own process with a time limit, and its row is stored at once. Sizes and
shapes of the instances (diffusers_models.json) are those of diffusers' own tests.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from benchmarks.models.count_sites import SiteCount
from benchmarks.models.diffusers_inputs import build, names
from benchmarks.models.diffusers_table import write_table
from dblocks.integrations.fuse.compiler import compiler
from dblocks.integrations.fuse.nodes import acts_beyond_its_result

RESULTS = Path(__file__).parents[1] / "results" / "fuse" / "diffusers.json"
KINDS = ("modulation", "gate")
OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4  # largest relative errors of outputs and of gradients
SMALL = 1e-4  # fraction of the largest gradient: errors of smaller gradients are relative to it


class Replaced:
    """A backend that compiles nothing and counts the fused ops of each run."""

    def __init__(self) -> None:
        self.sites: Counter[tuple[str, str]] = Counter()
        self.left: list[str] = []

    def __call__(self, module: GraphModule, inputs: Any) -> Callable[..., Any]:
        found: Counter[tuple[str, str]] = Counter()
        for part in module.modules():
            for node in _live(part) if isinstance(part, GraphModule) else []:
                found.update(_sites(node))

        def run(*args: Any) -> Any:
            self.sites.update(found)
            return module(*args)

        return run


def _live(module: GraphModule) -> set[Any]:
    """The nodes that the outputs depend on, or that have side effects."""
    nodes = module.graph.nodes
    new = {n for n in nodes if n.op == "output" or acts_beyond_its_result(n)}
    reached: set[Any] = set()
    while new:
        reached |= new
        new = {below for n in new for below in n.all_input_nodes} - reached
    return reached


def _sites(node: Any) -> list[tuple[str, str]]:
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == "gated_modulated":
        results = [user for user in node.users if user.args[1] == 0]
        gate = [("gate", _place(user)) for user in results or [node]]
        return [("modulation", _place(node)), *(gate if node.args[2] is not None else [])]
    kind = {"modulated": "modulation", "gated": "gate"}.get(name)
    return [(kind, _place(node))] if kind else []


def _place(node: Any) -> str:
    lines = [s for s in (node.meta.get("stack_trace") or "").splitlines() if "/diffusers/" in s]
    if not lines:
        return "?"
    file, _, function = lines[-1].partition('", line ')
    return f"{file.rpartition('/')[2]}: {function.rpartition(' in ')[2]}"


def row(name: str) -> dict[str, Any]:
    """Counts, errors and remaining sites of one class."""
    model, inputs = build(name)
    with torch.no_grad(), _plain_flex_attention(), SiteCount(model) as counted:
        sites = counted.sites(_call(model, inputs))
    want = _outcome(model, model, inputs)
    replaced, reports = Replaced(), []
    torch._dynamo.config.recompile_limit = 64
    options = {"inner": replaced, "report": reports.append}
    compiled = torch.compile(model, backend=compiler, options=options)
    got = _outcome(compiled, model, inputs, gradients=bool(want[1]))
    left = sites - replaced.sites
    errors = [_error(a, b) for a, b in zip(want[0], got[0], strict=True)]
    gradient_error = _gradient_error(want[1], got[1])
    own = _own_error(model, inputs, want[1]) if gradient_error > GRADIENT_LIMIT else 0.0
    return {
        "counted": {k: _total(sites, k) for k in KINDS},
        "replaced": {k: _total(replaced.sites, k) for k in KINDS},
        "graphs": len(reports),
        "output_error": max(errors),
        "gradient_error": gradient_error,
        **({"own_gradient_error": own} if own else {}),
        "gradients": sum(g is not None for g in want[1]),
        "left": {f"{kind} in {where}": n for (kind, where), n in sorted(left.items())},
        "reasons": sorted({line.partition(": ")[2] for r in reports for line in r.left}),
        **({"note": want[2]} if want[2] else {}),
    }


@contextlib.contextmanager
def _plain_flex_attention() -> Iterator[None]:
    """Makes flex_attention run uncompiled, since compilation would hide its operations."""
    from torch.nn.attention import flex_attention as flex

    name = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(flex, name, None)
    if before is not None:
        setattr(flex, name, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(flex, name, before)


def _total(sites: Counter[tuple[str, str]], kind: str) -> int:
    return sum(n for (found, _), n in sites.items() if found == kind)


def _call(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    plain = getattr(model, "_orig_mod", model)
    known = inspect.signature(plain.forward).parameters
    extra = {"return_dict": False} if "return_dict" in known else {}
    out = model(**copy.deepcopy(inputs), **extra)
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def _outcome(
    run: Any, model: nn.Module, inputs: dict[str, Any], *, gradients: bool = True
) -> tuple[list[Tensor], list[Tensor | None], str]:
    """Outputs, gradients of the parameters, and why there are no gradients.

    If the plain model has no gradients, they are not computed for the compiled one either: Dynamo
    does not compile a frame again after tracing has failed.
    """
    if not gradients:
        with torch.no_grad():
            return _call(run, inputs), [], ""
    try:
        outputs = _call(run, inputs)
    except NotImplementedError as error:  # such as flex_attention, which has no backward on a CPU
        with torch.no_grad():
            return _call(run, inputs), [], f"no gradients: {str(error).partition('.')[0]}"
    made = torch.Generator().manual_seed(1)
    loss = sum((y.float() * torch.randn(y.shape, generator=made)).sum() for y in outputs)
    parameters, note = [p for p in model.parameters() if p.requires_grad], ""
    grads: list[Tensor | None] = []
    try:
        grads = list(torch.autograd.grad(loss, parameters, allow_unused=True))  # pyright: ignore
    except NotImplementedError as error:
        note = f"no gradients: {str(error).partition('.')[0]}"
    return [y.detach() for y in outputs], grads, note


def _error(want: Tensor, got: Tensor, least: float = 0.0) -> float:
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    size = max(want.abs().max().item() if want.numel() else 0.0, least)
    off = (want - got).abs().max().item() if want.numel() else 0.0
    return off / size if off else 0.0


def _gradient_error(want: list[Any], got: list[Any]) -> float:
    if [g is None for g in want] != [g is None for g in got]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(want, got, strict=True) if a is not None]
    least = SMALL * max((a.abs().max().item() for a, _ in pairs), default=0.0)
    return max((_error(a, b, least) for a, b in pairs), default=0.0)


def _warm() -> None:
    """Loads what every child needs, without a backward, after which forking is not possible."""
    model, inputs = build("DiTTransformer2DModel")
    with torch.no_grad():
        _call(torch.compile(model, backend=compiler, options={"inner": "eager"}), inputs)
    torch._dynamo.reset()


def _own_error(model: nn.Module, inputs: dict[str, Any], want: list[Any]) -> float:
    """The change of the plain model's gradients due to one rounding unit in the inputs."""
    found = []
    for seed in range(8):
        made = torch.Generator().manual_seed(seed)
        moved = {
            key: x * (1 + 6e-8 * torch.randn(x.shape, generator=made))
            if isinstance(x, Tensor) and x.is_floating_point()
            else x
            for key, x in inputs.items()
        }
        found.append(_gradient_error(want, _outcome(model, model, moved)[1]))
    return max(found)


def _child(name: str, pipe: Any) -> None:
    try:
        pipe.send(row(name))
    except Exception as error:  # an error of a class becomes a row and does not end the run
        pipe.send({"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"})


def in_child(name: str, limit: float) -> dict[str, Any]:
    """`row` in a separate process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(name, there))
    child.start()
    there.close()
    try:
        found = here.recv() if here.poll(limit) else {"failed": f"over {limit:.0f} s"}
    except EOFError:
        found = {"failed": "the process ended without a result"}
    child.kill()
    child.join()
    return found


def stored() -> dict[str, Any]:
    """The rows of earlier runs."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"format": 1, "rows": {}}


def _store(record: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    new = RESULTS.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    new.replace(RESULTS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a class is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.diffusers_sites",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("classes", nargs="*", help="prefixes of names; default: without a row")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each class")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args(argv)
    record = stored()
    if not args.table:
        with contextlib.suppress(ImportError):
            sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]
        import diffusers

        _warm()
        record["diffusers"], record["torch"] = diffusers.__version__, torch.__version__
        for name in names():
            if not (name.startswith(tuple(args.classes)) if args.classes else
                    name not in record["rows"]):  # fmt: skip
                continue
            began = time.monotonic()
            found = record["rows"][name] = in_child(name, args.limit)
            print(f"{name} {time.monotonic() - began:.0f} s {found}", flush=True)
            _store(record)
    return write_table(record, OUTPUT_LIMIT, GRADIENT_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
