"""Times training steps of diffusers' transformers before and after `fuse_`, compiled and not.

    python -m benchmarks.models.fuse                2 layers of DiT-XL/2 and of SD3, batch 1, CPU
    python -m benchmarks.models.fuse --device cuda  all 28 and 24 layers, batch 16, bfloat16

A step is a forward and a backward pass. The forms of a model share parameters and inputs and are
interleaved in every round. Before timing, each fused form is compared with float64: errors of its
output and of the gradients of inputs and parameters may be twice those of the plain model of the
same kind plus 4 rounding units (compiled sums have larger errors than eager ones, so each kind has
its own budget). The total error of plain forms may be DISTANCE. Models of more than CHECKED_LAYERS
layers are compared at that depth, as a float64 copy would not fit on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models.operators import OperatorCount
from benchmarks.ops import timing
from benchmarks.ops.report import markdown
from dblocks.blocks.memory import SavedActivations
from dblocks.integrations.fuse import fuse_
from dblocks.testing import error_budget

LAYERS = {"cpu": (2, 2), "cuda": (28, 24)}
BATCH = {"cpu": 1, "cuda": 16}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
CHECKED_LAYERS, CHECKED_BATCH = 2, 2
TEXT_TOKENS = 77  # tokens of one CLIP text encoder
DISTANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # largest total error of plain forms
FORMS = ("plain", "fused", "plain, torch.compile", "fused, torch.compile")
FORMAT = 1


class Case(NamedTuple):
    """A model and its inputs."""

    name: str
    model: nn.Module
    floats: dict[str, Tensor]
    others: dict[str, Any]


def dit(layers: int, batch: int) -> Case:
    """DiT-XL/2 on latents of 256 x 256 pixels: width 1152, 256 tokens."""
    from diffusers import DiTTransformer2DModel  # pyright: ignore[reportPrivateImportUsage]

    model = DiTTransformer2DModel(num_layers=layers, out_channels=8)
    floats = {"hidden_states": torch.randn(batch, 4, 32, 32)}
    others = {
        "timestep": torch.arange(batch) * 37 % 1000,
        "class_labels": torch.arange(batch) * 61 % 1000,
    }
    return Case("DiT-XL/2: width 1152, 256 tokens", model, floats, others)


def sd3(layers: int, batch: int) -> Case:
    """Stable Diffusion 3 medium on latents of 256 x 256 pixels: width 1536, 256 + 77 tokens."""
    from diffusers import SD3Transformer2DModel  # pyright: ignore[reportPrivateImportUsage]

    model = SD3Transformer2DModel(
        num_layers=layers, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=192, sample_size=32,
    )  # fmt: skip
    floats = {
        "hidden_states": torch.randn(batch, 16, 32, 32),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 4096),
        "pooled_projections": torch.randn(batch, 2048),
    }
    others = {"timestep": torch.arange(batch) * 37 % 1000}
    return Case("SD3: width 1536, 256 + 77 tokens", model, floats, others)


def prepared(
    make: Callable[[int, int], Case], layers: int, batch: int, device: torch.device
) -> Case:
    """A case with modulations different from zero, without label dropout."""
    torch.manual_seed(0)
    case = make(layers, batch)
    with torch.no_grad():
        for p in case.model.parameters():
            if p.ndim < 2:
                p.normal_(std=0.02).add_(p.ndim == 0)
    model = case.model.to(device=device).eval()
    return case._replace(
        model=model,
        floats={k: v.to(device) for k, v in case.floats.items()},
        others={k: v.to(device) for k, v in case.others.items()},
    )


def step(model: nn.Module, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output, and the gradients of all inputs and parameters, by name."""
    floats = {k: v.to(dtype).requires_grad_() for k, v in case.floats.items()}
    output = model(**floats, **case.others, return_dict=False)[0]
    leaves = floats | dict(model.named_parameters())
    upstream = torch.ones_like(output).cumsum(-1).sin()
    grads = torch.autograd.grad(output, list(leaves.values()), upstream, allow_unused=True)
    found = {k: g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return {"output": output.detach(), **found}


def forms(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The model in every form, with shared parameters."""
    plain = nn.Module.to(case.model, dtype)
    # Copies of the modules that share parameters and buffers.
    shared = {id(t): t for t in (*plain.parameters(), *plain.buffers())}
    fused = copy.deepcopy(plain, dict(shared))
    fuse_(fused)
    compiled = [copy.deepcopy(m, dict(shared)) for m in (plain, fused)]
    for model in compiled:
        model.compile(fullgraph=True)
    return dict(zip(FORMS, (plain, fused, *compiled), strict=True))


def wrong(got: dict[str, Tensor], eager: dict[str, Tensor], ref64: dict[str, Tensor]) -> str:
    """The result that exceeds its budget; empty if there is none."""
    largest = max(v.abs().max().item() for v in ref64.values())
    for name, ref in ref64.items():
        # Gradients that cancel, such as that of the keys' bias, are only rounding errors.
        if ref.abs().max() > 1e-9 * largest:
            error = (got[name].double() - ref).abs().max().item()
            budget = error_budget(ref, eager[name], got[name].dtype)
            if not error <= budget:
                return f"{name}: error {error:.1e} is over {budget:.1e}"
    return ""


def distance(got: dict[str, Tensor], ref64: dict[str, Tensor]) -> float:
    """The norm of all errors, relative to the norm of the reference."""
    errors = [(got[name].double() - ref).norm() for name, ref in ref64.items()]
    total = torch.stack([ref.norm() for ref in ref64.values()]).norm()
    return (torch.stack(errors).norm() / total).item()


def check(case: Case, found: dict[str, nn.Module], dtype: torch.dtype) -> dict[str, str]:
    """The errors of each form; empty if it is correct."""
    reference = nn.Module.to(copy.deepcopy(case.model), torch.float64)
    ref64 = step(reference, case, torch.float64)
    del reference
    faults, unfused = {}, {}
    for name, model in found.items():
        print(f"checking {case.name}, {name}", file=sys.stderr)
        kind, got = name.removeprefix("plain").removeprefix("fused"), step(model, case, dtype)
        if kind in unfused:
            faults[name] = wrong(got, unfused[kind], ref64)
            continue
        unfused[kind], error = got, distance(got, ref64)
        far = error > DISTANCE[dtype]
        faults[name] = f"relative error {error:.1e} is over {DISTANCE[dtype]:.1e}" if far else ""
    return faults


def measure(
    make: Callable[[int, int], Case],
    device: torch.device,
    rounds: int,
    *,
    layers: int,
    batch: int,
) -> list[dict[str, Any]]:
    """One row for each form of a model."""
    dtype = DTYPE[device.type]
    torch._dynamo.reset()
    small = min(layers, CHECKED_LAYERS), min(batch, CHECKED_BATCH)
    case = prepared(make, *small, device)
    found = forms(case, dtype)
    faults = check(case, found, dtype)
    if small != (layers, batch):
        case = prepared(make, layers, batch, device)
        found = forms(case, dtype)
    rows: list[dict[str, Any]] = []
    runs: dict[str, timing.Run] = {}
    for name, model in found.items():
        row = {"model": case.name, "layers": layers, "batch": batch, "form": name}
        row["wrong"] = faults[name]
        run = runs[name] = lambda model=model: step(model, case, dtype)
        if "compile" not in name:
            with SavedActivations(model.parameters()) as saved:
                output = model(**_inputs(case, dtype), return_dict=False)[0]
            row["saved_mib"] = saved.bytes / 2**20
            del output
            with OperatorCount() as counter:
                run()
            row["operators"] = counter.count
        if device.type == "cuda":
            row["peak_mib"] = timing.cuda_peak_bytes(run) / 2**20
        rows.append(row)
    print(f"timing {case.name}", file=sys.stderr)
    good = {r["form"]: runs[r["form"]] for r in rows if not r["wrong"]}
    times = timing.interleaved(good, device, rounds, round_ms=1.0)
    for row in rows:
        if row["form"] in times:
            row |= timing.summary(times[row["form"]])
    return rows


def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype).requires_grad_() for k, v in case.floats.items()} | case.others


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as markdown, with times relative to the plain model."""
    plain = {r["model"]: r["ms"] for r in rows if r["form"] == "plain"}
    lines = []
    for r in rows:
        head = (r["model"], r["layers"], r["batch"], r["form"])
        if r["wrong"]:
            lines.append((*head, f"wrong: {r['wrong']}", "", "", "", ""))
            continue
        lines.append((
            *head,
            f"{r['ms']:.1f} ({r['ms_p20']:.1f}-{r['ms_p80']:.1f})",
            f"{r['ms'] / plain[r['model']]:.2f}x",
            f"{r['saved_mib']:.1f}" if "saved_mib" in r else "",
            f"{r['peak_mib']:.1f}" if "peak_mib" in r else "",
            r.get("operators", ""),
        ))  # fmt: skip
    header = ("model", "layers", "batch", "form", "ms (p20-p80)", "over plain",
              "saved activations, MiB", "peak, MiB", "operators")  # fmt: skip
    return markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a form is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.fuse", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15, help="rounds of every form")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(argv)
    # diffusers imports transformers, which fails with a torchvision built for another torch.
    sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]
    try:
        import diffusers
    except ImportError as error:
        print(f"absent: diffusers is not installed ({error}), so none of its models is timed")
        return 0

    device = torch.device(args.device)
    rows: list[dict[str, Any]] = []
    for make, layers in zip((dit, sd3), LAYERS[device.type], strict=True):
        rows += measure(make, device, args.rounds, layers=layers, batch=BATCH[device.type])
    where = {**timing.environment(device), "diffusers": diffusers.__version__}
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = args.out / f"step-{device.type}"
        record = {
            "format": FORMAT, "environment": where, "rounds": args.rounds,
            "dtype": str(DTYPE[device.type]).removeprefix("torch."), "rows": rows,
        }  # fmt: skip
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        text = (
            "# Training steps of diffusers' transformers, fused and not\n\n"
            f"{where['device']}, {where['threads']} threads, torch {where['torch']}, diffusers "
            f"{where['diffusers']}, commit {where['commit']}, {record['dtype']}, {args.rounds} "
            f"rounds\n\n{table(rows)}\n"
        )
        stem.with_suffix(".md").write_text(text)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    timing.restart_with_malloc_settings()
    sys.exit(main())
