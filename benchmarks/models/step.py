"""Times training steps of a ViT: of one block, fused and not, and end to end.

    python -m benchmarks.models.step                D = 384, 12 layers, 65 tokens, batch 32, CPU
    python -m benchmarks.models.step --device cuda  D = 1024, 24 layers, 257 tokens, batch 64, bf16

All forms use the same batch and optimizer and are interleaved in every round. A block's step trains
one of three blocks; three such steps run as many layers as one end-to-end step. Before timing, loss
and gradient norm of each form are compared with those of the reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from benchmarks.models.operators import OperatorCount
from benchmarks.ops import timing
from benchmarks.ops.report import markdown
from dblocks import BlocksConfig, DiffusionBlocks, make_optimizers
from dblocks.blocks.memory import SavedActivations
from dblocks.models import ViT, ViTConfig
from dblocks.ops import _dispatch

SIZES = {
    "cpu": {"image_size": 32, "patch_size": 4, "width": 384, "depth": 12, "heads": 6},
    "cuda": {"image_size": 64, "patch_size": 4, "width": 1024, "depth": 24, "heads": 16},
}
BATCH = {"cpu": 32, "cuda": 64}
BLOCKS = 3
BLOCK = 1  # the trained block; all have the same layers
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # relative; for float32, and for bfloat16 autocast
FORMAT = 1


class Form(NamedTuple):
    """A form of the step: `run` makes a step, `loss` is its forward pass."""

    run: Callable[[], object]
    loss: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    layers: int


def _reference(x: Tensor) -> str:
    return "reference"


@contextmanager
def reference_only() -> Iterator[None]:
    """Makes ops with impl="auto" use the reference inside the `with` block."""
    with mock.patch.object(_dispatch, "_auto", _reference):
        yield


def forms(device: torch.device, sizes: dict[str, int] | None = None) -> dict[str, Form]:
    """Every form of the step, by name."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**(sizes or SIZES[device.type]), gate_init=1.0)).to(device)  # pyright: ignore[reportArgumentType]
    size = vit.config.height_width
    batch = {
        "images": torch.randn(BATCH[device.type], vit.config.channels, *size, device=device),
        "labels": torch.randint(vit.config.num_classes, (BATCH[device.type],), device=device),
    }
    nn.init.normal_(vit.classifier.weight, std=0.02)  # at zero, layers get no gradients
    model = DiffusionBlocks(vit, BlocksConfig(num_blocks=BLOCKS))
    draw = model.draw(batch, BLOCK, generator=torch.Generator().manual_seed(0))
    # With a learning rate of 0 all rounds compute the same, and forms can be compared at any time.
    optimizers = make_optimizers(model, lambda p: torch.optim.AdamW(p, lr=0.0, fused=True))
    whole = torch.optim.AdamW(vit.parameters(), lr=0.0, fused=True)
    moved = optimizers.of_block(BLOCK)
    block_parameters = [p for o in moved for group in o.param_groups for p in group["params"]]

    def autocast() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def block_loss() -> Tensor:
        with autocast():
            return model.loss_at(batch, BLOCK, draw).loss

    def reference_loss() -> Tensor:
        with reference_only():
            return block_loss()

    def whole_loss() -> Tensor:
        with autocast():
            return nnf.cross_entropy(vit(batch["images"]), batch["labels"])

    torch._dynamo.reset()
    compiled_loss = torch.compile(block_loss, fullgraph=True)

    def compiled_reference_loss() -> Tensor:
        with reference_only():
            return compiled_loss()

    def step(loss: Callable[[], Tensor], many: Sequence[torch.optim.Optimizer]) -> object:
        loss().backward()
        for optimizer in many:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    layers = len(vit.layers)
    found = {
        "block, fused": (block_loss, moved, block_parameters, layers // BLOCKS),
        "block, reference": (reference_loss, moved, block_parameters, layers // BLOCKS),
        "block, torch.compile of the reference": (
            compiled_reference_loss, moved, block_parameters, layers // BLOCKS,
        ),
        "end to end, fused": (whole_loss, (whole,), list(vit.parameters()), layers),
    }  # fmt: skip
    return {
        name: Form(lambda loss=loss, many=many: step(loss, many), loss, parameters, count)
        for name, (loss, many, parameters, count) in found.items()
    }


def launches(form: Form, device: torch.device) -> int | None:
    """Number of kernel launches of a step on a GPU, or of operators on a CPU.

    None for compiled code on a CPU, which calls no operators.
    """
    form.run()
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            form.run()
        return sum(e.count for e in profile.key_averages())
    with OperatorCount() as counter:
        form.run()
    return counter.count


def state(form: Form) -> tuple[float, float]:
    """The loss, and the norm of the gradients."""
    for p in form.parameters:
        p.grad = None
    loss = form.loss()
    loss.backward()
    grads = [p.grad for p in form.parameters if p.grad is not None]
    norm = torch.stack([g.float().norm() for g in grads]).norm().item()
    for p in form.parameters:
        p.grad = None
    return loss.item(), norm


def measure(device: torch.device, rounds: int, sizes: dict[str, int] | None = None) -> list[dict]:
    """One row for each form."""
    found = forms(device, sizes)
    expected = state(found["block, reference"])
    rows = []
    for name, form in found.items():
        compiled = "compile" in name
        row: dict[str, Any] = {"form": name, "layers": form.layers, "wrong": ""}
        if name.startswith("block"):
            got = state(form)
            limit = LOSS_TOLERANCE[device.type]
            if any(abs(g - e) > limit * abs(e) for g, e in zip(got, expected, strict=True)):
                row["wrong"] = f"loss and norm {got}, reference {expected}"
        row["launches"] = None if compiled and device.type == "cpu" else launches(form, device)
        if not compiled:
            with SavedActivations(form.parameters) as saved:
                loss = form.loss()
            row["saved_mib"] = saved.bytes / 2**20
            del loss
        if device.type == "cuda":
            row["peak_mib"] = timing.cuda_peak_bytes(form.run) / 2**20
        rows.append(row)
    good = {r["form"]: found[r["form"]].run for r in rows if not r["wrong"]}
    times = timing.interleaved(good, device, rounds, round_ms=1.0)
    for row in rows:
        if row["form"] in times:
            row |= timing.summary(times[row["form"]])
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown, with times relative to the fused block."""
    ours = next((r["ms"] for r in rows if r["form"] == "block, fused" and "ms" in r), None)
    lines = []
    for r in rows:
        if "ms" not in r:
            lines.append((r["form"], r["layers"], f"wrong: {r['wrong']}", "", "", "", ""))
            continue
        lines.append((
            r["form"], r["layers"],
            f"{r['ms']:.1f} ({r['ms_p20']:.1f}-{r['ms_p80']:.1f})",
            "" if ours is None else f"{r['ms'] / ours:.2f}x",
            "" if r.get("saved_mib") is None else f"{r['saved_mib']:.1f}",
            "" if r.get("peak_mib") is None else f"{r['peak_mib']:.1f}",
            "one graph" if r["launches"] is None else r["launches"],
        ))  # fmt: skip
    header = ("step", "layers", "ms (p20-p80)", "over the fused block", "saved activations, MiB",
              "peak, MiB", "launches")  # fmt: skip
    return markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a form is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15, help="rounds of every form")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows = measure(device, args.rounds)
    where = timing.environment(device)
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"step-{device.type}"
        record = {"format": FORMAT, "environment": where, "rounds": args.rounds, "rows": rows}
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        line = f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit "
        text = f"# Training steps of a ViT\n\n{line}{where['commit']}\n\n{table(rows)}\n"
        stem.with_suffix(".md").write_text(text)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    timing.restart_with_malloc_settings()
    sys.exit(main())
