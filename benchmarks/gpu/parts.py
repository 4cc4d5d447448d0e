"""The parts of `python -m benchmarks.gpu`, each a function that measures and writes rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dblocks.functional as D

if TYPE_CHECKING:
    from benchmarks.gpu.__main__ import Run

ROOT = Path(__file__).parents[2]
ELEMENTS = 2**26  # 128 MiB in bfloat16, more than L2 holds
SAMPLES = 8
WIDTHS = (2048, 1152, 4096, 5120, 8192, 768)
# Heads, head width, tokens, block size; batch size 4.
SHAPES = (
    (16, 128, 4096, 1),
    (16, 128, 4096, 32),
    (32, 64, 4096, 1),
    (16, 128, 512, 1),
    (16, 128, 1024, 32),
    (32, 64, 4096, 32),
    (16, 128, 8192, 1),
)
DRY_WIDTHS, DRY_SHAPES = (64, 48), ((2, 16, 16, 1), (2, 16, 16, 4))
CHECKED_TOKENS = 1024  # for the check of attention: float64 scores must fit into memory
EPS = 1e-6
TEST_SECONDS = 30  # seconds needed to start the tests
AGAIN = {"retain_graph": True}
grad = torch.autograd.grad


def trained(*frozen: Tensor) -> list[Tensor]:
    """Copies of these tensors as leaves that require gradients."""
    return [t.detach().clone().requires_grad_() for t in frozen]


def error(got: Tensor, want: Tensor) -> float:
    """The relative error, in norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def repeats(call: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether two calls agree bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


def of_copy(run: Run, count: int, ms: dict[str, float], **bytes_each: int) -> dict[str, float]:
    """Fractions of a copy's bandwidth, from the bytes per element and `count` elements."""
    return {f"{k}_of_copy": b * count / ms[k] * 1e3 / run.copy for k, b in bytes_each.items()}


def tensors(run: Run, width: int, count: int = ELEMENTS) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """x, branch, dy and dx_new [N, T, width] without gradients; (gate, shift, scale)."""
    N, T = (2, 3) if run.dry else (SAMPLES, count // (SAMPLES * width))
    return [run.random(N, T, width) for _ in range(4)], run.random(N, 3 * width).chunk(3, -1)


def eager_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaln in eager PyTorch."""
    norm = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, None], norm, 1 + scale[:, None])


def compile_beforehand(run: Run) -> None:
    """Fills Triton's cache on all cores, so that the parts do not wait for the compiler."""
    if run.dry:
        run.row(part="compile", skipped="the interpreter compiles nothing")
        return
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    jobs = [("norms", D) for D in WIDTHS] + [("diffusion", WIDTHS[0])]
    jobs += [("attention", shape) for shape in SHAPES]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        counts = list(pool.map(compile_job, [(*job, capability) for job in jobs]))
    run.row(part="compile", kernels=sum(counts), processes=os.cpu_count())


def compile_job(job: tuple[str, Any, int]) -> int:
    """Compiles the launches of the parts at one width or shape; returns their number."""
    from triton.backends.compiler import GPUTarget

    from benchmarks.kernels import cases, check
    from benchmarks.kernels.model import rows

    what, of, capability = job
    if what == "attention":
        heads, width, T, block = of
        target = f"sm_{capability}"
        cases.N, cases.T, cases.HEADS = 4, T, heads
        attend = cases.attend
        launches = [lambda: attend(width, torch.bfloat16, target, block_size=block)]
    else:
        calls = rows.norms(of) if what == "norms" else rows.diffusion(of)
        launches = list({id(call.launch): call.launch for _, call in calls}.values())
    caught = [c for launch in launches for c in check.catch(launch)]
    for launch in caught:
        check.compile_launch(launch, GPUTarget("cuda", capability, 32))
    return len(caught)


def ceilings(run: Run) -> None:
    """Bandwidth of a copy, and speed of a matrix product."""
    a, size = run.random(2**10 if run.dry else ELEMENTS), 64 if run.dry else 8192
    m, b = run.random(size, size), torch.empty_like(a)
    ms = run.times({"copy": lambda: b.copy_(a), "matmul": lambda: m @ m})
    run.copy = 2 * a.nbytes / ms["copy"] * 1e3
    run.row(
        part="ceilings", copy_gb_s=run.copy / 1e9, matmul_tflops=2 * size**3 / ms["matmul"] / 1e9
    )


def adaln(run: Run) -> None:
    """adaln and residual_adaln: errors of one sample against float64, repeatability, bandwidth."""
    e = run.dtype.itemsize
    for W in DRY_WIDTHS if run.dry else WIDTHS:
        if not run.allows(part="adaln", D=W):
            continue
        (x, branch, dy, dx_new), m = tensors(run, W)
        xg, bg, *mg = trained(x, branch, *m)
        y = D.adaln(xg, *mg[1:], eps=EPS, impl="triton")
        both = D.residual_adaln(xg, bg, *mg, eps=EPS, impl="triton")
        calls = {
            "fwd": lambda x=x, m=m: D.adaln(x, *m[1:], eps=EPS, impl="triton"),
            "bwd": lambda y=y, xg=xg, mg=mg, dy=dy: grad(y, [xg, *mg[1:]], dy, **AGAIN),
            "res_fwd": lambda x=x, b=branch, m=m: D.residual_adaln(
                x, b, *m, eps=EPS, impl="triton"
            ),
            "res_bwd": lambda both=both, of=(xg, bg, *mg), up=(dx_new, dy): grad(
                both, of, up, **AGAIN
            ),
        }
        same = repeats(calls["bwd"]) and repeats(calls["res_bwd"])
        exact = trained(*(t[:1].double() for t in (x, *m[1:])))
        want = eager_adaln(*exact)
        wanted = (want, *grad(want, exact, dy[:1].double()))
        errors = [error(a[:1], b) for a, b in zip((y, *calls["bwd"]()), wanted, strict=True)]
        bytes_each = {"fwd": 2 * e, "bwd": 3 * e, "res_fwd": 4 * e, "res_bwd": 6 * e}
        shares = of_copy(run, x.numel(), run.times(calls), **bytes_each)
        names = ("err_y", "err_dx", "err_dshift", "err_dscale")
        run.row(part="adaln", D=W, repeats=same, **dict(zip(names, errors, strict=True)), **shares)


def attention(run: Run) -> None:
    """doubled_attention, and the composed attention if available: TFLOP/s of the allowed pairs."""
    samples = 1 if run.dry else 4
    for H, W, T, block in DRY_SHAPES if run.dry else SHAPES:
        about: dict[str, Any] = {"part": "attention", "H": H, "d": W, "T": T, "block": block}
        if not run.allows(**about):
            continue
        qkv = [run.random(samples, 2 * T, H, W).transpose(1, 2).requires_grad_() for _ in "qkv"]
        frozen, up = [t.detach() for t in qkv], run.random(samples, H, 2 * T, W)
        options: dict[str, Any] = {"block_size": block, "impl": "triton"}
        o = D.doubled_attention(*qkv, **options)
        calls: dict[str, Callable[[], Any]] = {
            "fwd": lambda of=frozen, options=options: D.doubled_attention(*of, **options),
            "bwd": lambda o=o, of=qkv, up=up: grad(o, of, up, **AGAIN),
        }
        about["repeats"] = repeats(lambda run=calls: (run["fwd"](), *run["bwd"]()))
        if T <= CHECKED_TOKENS:
            exact = trained(*(t[:1, :2].double() for t in qkv))
            want = D.doubled_attention(*exact, block_size=block, impl="reference")
            wanted = grad(want, exact, up[:1, :2].double())
            pairs = zip(calls["bwd"](), wanted, strict=True)
            about["err_o"] = error(o[:1, :2], want)
            about["err_grad"] = max(error(a[:1, :2], b) for a, b in pairs)
        for backend in ("sdpa",) if run.dry else ("cudnn", "sdpa"):
            _add_composed(about, calls, backend, block, qkv, frozen, up, o)
        pairs = 4 * (samples / 4) * H * T * (T + block)
        for name, ms in run.times(calls, rounds=5).items():
            products = 2 if name.endswith("fwd") else 5
            about[f"{name}_tflops"] = products * 2 * pairs * W / ms / 1e9
        run.row(**about)


def _add_composed(
    about: dict[str, Any], calls: dict[str, Callable[[], Any]], backend: str, block: int,
    qkv: list[Tensor], frozen: list[Tensor], up: Tensor, o: Tensor,
) -> None:  # fmt: skip
    """Composed attention on a backend, with its difference from the kernel; or why it is absent."""
    options: dict[str, Any] = {"block_size": block, "impl": "composed", "backend": backend}
    try:
        other = D.doubled_attention(*qkv, **options)
    except Exception as failure:
        about[backend] = f"{type(failure).__name__}: {str(failure)[:80]}"
        return
    about[f"diff_{backend}"] = error(other, o)
    calls[f"{backend}_fwd"] = lambda: D.doubled_attention(*frozen, **options)
    calls[f"{backend}_bwd"] = lambda: grad(other, qkv, up, **AGAIN)


def diffusion(run: Run) -> None:
    """Noise, the loss and an Euler step; the noise is compared with the reference on the CPU."""
    W = DRY_WIDTHS[0] if run.dry else WIDTHS[0]
    (y, f, *_), _ = tensors(run, W)
    fg, sigma = f.clone().requires_grad_(), torch.logspace(-2, 1, len(y), device=run.device)
    z, up, e = y.float(), run.random(len(y), dtype=torch.float32), run.dtype.itemsize
    ours: dict[str, Any] = {"impl": "triton"}
    loss = D.edm_loss(fg, y, sigma, 1, **ours)
    on_cpu = D.noise_inject(y[:1, :64].cpu(), sigma[:1].cpu(), 1, impl="reference")
    z_gpu = D.noise_inject(y, sigma, 1, **ours).z
    assert z_gpu is not None
    assert on_cpu.z is not None
    apart = (z_gpu[:1, :64].cpu() - on_cpu.z).abs().max() / sigma[0].cpu()
    ms = run.times({
        "noise": lambda: D.noise_inject(y, sigma, 1, **ours),
        "noise_z_in": lambda: D.noise_inject(y, sigma, 1, need_z=False, **ours),
        "loss_fwd": lambda: D.edm_loss(f, y, sigma, 1, **ours),
        "loss_fwd_training": lambda: D.edm_loss(fg, y, sigma, 1, **ours),
        "loss_bwd": lambda: grad(loss, fg, up, **AGAIN),
        "euler": lambda: D.euler_step(z, z, 1.0, 0.5, **ours),
    })  # fmt: skip
    losses = {"loss_fwd": 2 * e, "loss_fwd_training": 3 * e, "loss_bwd": 2 * e}
    noises = {"noise": 2 * e + 4, "noise_z_in": 2 * e}
    shares = of_copy(run, y.numel(), ms, **noises, **losses, euler=12)
    run.row(part="diffusion", D=W, noise_apart=apart.item(), **shares)


def small(run: Run) -> None:
    """[8, 128, 768]: microseconds on the host, and on the GPU when a graph replays the call."""
    (x, _, dy, _), m = tensors(run, DRY_WIDTHS[0] if run.dry else 768, SAMPLES * 128 * 768)
    leaves, found = trained(x, *m[1:]), {}
    ours = lambda *of: D.adaln(*of, eps=EPS, impl="triton")
    for name, call in {"dblocks": ours, "eager": eager_adaln, **_liger(run)}.items():
        for times in (1,) if run.dry else (50, 300):
            if not run.dry:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(times):
                grad(call(*leaves), leaves, dy)
            found[f"{name}_host_us"] = (time.perf_counter() - began) / times * 1e6
    if not run.dry:
        ours(x, *m[1:])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours(x, *m[1:])
        found["graph_fwd_us"] = run.times({"graph": graph.replay})["graph"] * 1e3
    run.row(part="small", **found)


def _liger(run: Run) -> dict[str, Callable[..., Tensor]]:
    """Liger's layer norm and the modulation; writes a row if it is absent."""
    from benchmarks.ops import baselines

    if run.dry:
        return {}
    try:
        liger = baselines.liger_layer_norm()
    except ImportError as missing:
        run.row(
            part="small",
            implementation="liger",
            absent=f"liger-kernel is not installed ({missing})",
        )
        return {}
    return {
        "liger": lambda x, shift, scale: next(o for o in liger(x, shift, scale) if o is not None)
    }


def inductor(run: Run) -> None:
    """adaln compiled by torch.compile."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # otherwise the backward cannot run twice
    e = run.dtype.itemsize
    for W in DRY_WIDTHS[:1] if run.dry else WIDTHS[:2]:
        if not run.allows(part="inductor", D=W):
            continue
        (x, _, dy, _), m = tensors(run, W)
        leaves = trained(x, *m[1:])
        call = torch.compile(eager_adaln, fullgraph=True, dynamic=False)
        y, forward = call(*leaves), torch.no_grad()(lambda call=call, x=x, m=m: call(x, *m[1:]))
        backward = lambda y=y, of=leaves, dy=dy: grad(y, of, dy, **AGAIN)
        ms = run.times({"fwd": forward, "bwd": backward})
        shares = of_copy(run, x.numel(), ms, fwd=2 * e, bwd=3 * e)
        run.row(part="inductor", of="adaln", D=W, **shares)


def flex(run: Run) -> None:
    """FlexAttention at block 1, compiled, with its default tiles and with tuned ones."""
    from benchmarks.ops import attention as baselines

    H, W, T, _ = DRY_SHAPES[0] if run.dry else SHAPES[0]
    samples = 1 if run.dry else 4
    for name, options in (("flex", None), ("flex tuned", baselines.TUNED_FLEX)):
        if not run.allows(part="flex", implementation=name):
            continue
        if run.dry:
            run.row(part="flex", implementation=name, skipped="has no backward on CPUs")
            continue
        q, k, v = (run.random(samples, H, 2 * T, W).requires_grad_() for _ in "qkv")
        call, up = baselines.flex(options), run.random(samples, H, 2 * T, W)
        (o,) = call(q, k, v)
        assert o is not None
        apart = error(o, D.doubled_attention(q, k, v, impl="triton"))
        forward = torch.no_grad()(lambda call=call, of=(q, k, v): call(*of))
        backward = lambda o=o, of=(q, k, v), up=up: grad(o, of, up, **AGAIN)
        ms = run.times({"fwd": forward, "bwd": backward}, rounds=5)
        pairs = samples * H * T * (T + 1)
        tflops = {
            f"{n}_tflops": (2, 5)[n == "bwd"] * 2 * pairs * W / t / 1e9 for n, t in ms.items()
        }
        run.row(part="flex", implementation=name, d=W, T=T, diff=apart, **tflops)


def tests(run: Run) -> None:
    """The tests of the kernels in the rest of the budget; writes the last line of pytest."""
    from importlib.util import find_spec

    if not run.dry and run.left() < TEST_SECONDS:
        run.row(part="tests", skipped=f"{run.left():.0f} s are left")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20"]
    workers = min(os.cpu_count() or 1, 16)
    if run.dry:
        command += ["--collect-only", "tests/kernels/test_philox.py"]
    else:
        command += ["-n", str(workers)] if find_spec("xdist") else []
        command += ["tests/kernels", "tests/ops"]
        if not find_spec("xdist"):
            run.row(part="tests", absent="pytest-xdist is not installed: one process")
    try:
        limit = max(run.left(), TEST_SECONDS)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        said, last = done.stdout + done.stderr, done.stdout.strip().rpartition("\n")[2]
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        last = f"stopped after {late.timeout:.0f} s"
    (run.out / "tests.log").write_text(said, encoding="utf-8")
    run.row(part="tests", last=last)


PARTS: dict[str, Callable[[Run], None]] = {
    "compile": compile_beforehand,
    "ceilings": ceilings,
    "adaln": adaln,
    "attention": attention,
    "diffusion": diffusion,
    "small": small,
    "inductor": inductor,
    "flex": flex,
    "tests": tests,
}
