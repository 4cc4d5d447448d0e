"""Checks outputs and gradients of an implementation against float64, before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.ops.op import Implementation, Op
from dblocks.testing import error_budget

# Factor on the budget of dblocks for baselines. The budget follows eager PyTorch, whose sums over
# rows are unusually exact; torch.compile's sequential sums are less exact but not wrong.
BASELINE_SLACK = 8
SIZE_TOLERANCE = 0.05  # relative, of the standard deviation of own noise

_upstream: dict[tuple, Tensor] = {}


def tensors(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The outputs that are not None."""
    return [o for o in outputs if o is not None]


def upstream(output: Tensor) -> Tensor:
    """A normal upstream gradient, drawn once: with zeros or ones a GPU's clock would be faster."""
    key = (output.shape, output.dtype, output.device)
    if key not in _upstream:
        g = torch.Generator(output.device).manual_seed(1)
        _upstream[key] = torch.randn(
            output.shape, generator=g, dtype=output.dtype, device=output.device
        )
    return _upstream[key]


def leaves_of(op: Op, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as leaves; those with gradients in the op require them."""
    return {k: v.detach().requires_grad_(k in op.needs_grad) for k, v in inputs.items()}


def gradients(
    op: Op, outputs: Sequence[Tensor], leaves: dict[str, Tensor], *, keep_graph: bool = True
) -> list[Tensor]:
    """The gradients of the inputs; the graph is kept if the backward is called again."""
    wanted = [leaves[name] for name in op.needs_grad]
    given = [upstream(o) for o in outputs]
    return list(torch.autograd.grad(outputs, wanted, given, retain_graph=keep_graph))


def results(op: Op, call: Implementation, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients of an implementation."""
    if not op.needs_grad:
        with torch.no_grad():
            return tensors(call(**inputs))
    leaves = leaves_of(op, inputs)
    outputs = tensors(call(**leaves))
    return [o.detach() for o in outputs] + gradients(op, outputs, leaves)


def wrong(
    op: Op,
    call: Implementation,
    inputs: dict[str, Tensor],
    definition: Implementation | None = None,
) -> str:
    """The error of an implementation; empty if it is correct.

    A baseline whose result differs from the op's has its own `definition`.
    """
    got = results(op, call, inputs)
    if not all(torch.isfinite(o).all() for o in got):
        return "not finite"
    if op.oracle is not None and call is not op.ours:
        return _wrong_size(got, results(op, op.eager, inputs))
    plain = definition or op.oracle or op.eager
    own = results(op, plain, inputs)
    doubled = {k: v.double() for k, v in inputs.items()}
    ref64 = _with_upstream_of(op, plain, doubled, got)
    for result, reference, eager in zip(got, ref64, own, strict=True):
        error = (result.double() - reference).abs().max().item()
        limit = error_budget(reference, eager, result.dtype)
        limit *= 1 if call is op.ours else BASELINE_SLACK
        if error > limit:
            return f"error {error:.2e} over the budget {limit:.2e}"
    return ""


def _with_upstream_of(
    op: Op, call: Implementation, inputs: dict[str, Tensor], like: Sequence[Tensor]
) -> list[Tensor]:
    """`results`, with the upstream gradients of the outputs `like`, which have narrower dtypes."""
    if not op.needs_grad:
        return results(op, call, inputs)
    leaves = leaves_of(op, inputs)
    outputs = tensors(call(**leaves))
    given = [upstream(o).double() for o in like[: len(outputs)]]
    wanted = [leaves[name] for name in op.needs_grad]
    grads = torch.autograd.grad(outputs, wanted, given)
    return [*(o.detach() for o in outputs), *grads]


def _wrong_size(got: Sequence[Tensor], eager: Sequence[Tensor]) -> str:
    """Compares only the standard deviation of a baseline's own noise with that of eager PyTorch."""
    pairs = [(o.double().std(), e.double().std()) for o, e in zip(got, eager, strict=True)]
    bad = [
        f"standard deviation {o:.4f} != {e:.4f}"
        for o, e in pairs
        if abs(o - e) > SIZE_TOLERANCE * e
    ]
    return "; ".join(bad)
