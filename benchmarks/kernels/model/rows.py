"""The memory-bound kernels: fractions of a copy's bandwidth in the cycle model.

Shapes are [8, 2^26 / (8 D), D], for cross-entropy [2^27 / V, V]; modulations are chunks of bfloat16
[8, 6 D]. The bytes of a call are those of benchmarks/ops/registry.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.kernels import cases, check
from benchmarks.kernels.check import Caught
from benchmarks.kernels.model import sass, sim
from benchmarks.kernels.model.sass import Kernel
from benchmarks.kernels.model.sim import Segment
from dblocks.ops._dispatch import planned

SAMPLES, ELEMENTS, LOGITS = 8, 2**26, 2**27
DTYPE = torch.bfloat16
GROUP_SHAPE = (1, 4096, 3072)  # one sample: all rows share the modulation
ROUNDS = 3  # rounds of CTAs on the SM, for short CTAs
LONG_TRIPS = 60  # passes of a loop above which one CTA is enough
MIN_CTAS = 24


class Call(NamedTuple):
    """A launch function, its bytes per element, and the index of the kernel to model."""

    launch: Callable[[], object]
    bytes_each: int
    elements: int
    kernel: str


class Modelled(NamedTuple):
    """The `share` of a copy's bandwidth, clocks of an SM, and the compiled kernel."""

    share: float
    clocks: float
    kernel: Kernel


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norms(D: int, N: int = SAMPLES, elements: int = ELEMENTS) -> Iterator[tuple[str, Call]]:
    """The AdaLN family, forward and backward."""
    e, T = DTYPE.itemsize, elements // (N * D)
    x, f, d1, d2 = (meta(N, T, D, dtype=DTYPE) for _ in range(4))
    m = meta(N, 6 * D, dtype=DTYPE).chunk(6, -1)[:3]
    affine, none, norm = (meta(D), None), (None, None), cases.norm
    launches = {
        "adaln": (2, 3, lambda: norm(x, None, m, none, (None, d2), rms=False)),
        "rms": (2, 3, lambda: norm(x, None, m, affine, (None, d2), rms=True)),
        "residual_adaln": (4, 6, lambda: norm(x, f, m, none, (d1, d2), rms=False)),
        "gated_residual": (3, 3, lambda: norm(x, f, m, none, (d1, None), rms=False)),
    }
    for name, (forward, backward, launch) in launches.items():
        yield f"{name} fwd", Call(launch, forward * e, N * T * D, "fwd")
        yield f"{name} bwd", Call(launch, backward * e, N * T * D, "bwd")
        yield f"{name} group_grads", Call(launch, 0, N * T * D, "group_grads")


def diffusion(D: int) -> Iterator[tuple[str, Call]]:
    """Noise, losses and Euler steps."""
    from dblocks.kernels import noise
    from dblocks.kernels.edm import denoise, euler, loss

    e, N, T = DTYPE.itemsize, SAMPLES, ELEMENTS // (SAMPLES * D)
    y, f = (meta(N, T, D, dtype=DTYPE) for _ in range(2))
    z, sigma, drawn = meta(N, T, D), meta(N), (None, 1, 0, 0.5)
    inject, loss_fwd = planned(noise.noise_inject_fwd), planned(loss.edm_loss_fwd)
    launches = {
        "noise_inject": (2 * e + 4, lambda: inject(y, sigma, *drawn, DTYPE, True)),
        "noise_inject z_in": (2 * e, lambda: inject(y, sigma, *drawn, DTYPE, False)),
        "edm_denoise": (e + 8, lambda: planned(denoise.edm_denoise_fwd)(f, z, sigma, 0.5)),
        "edm_loss fwd": (2 * e, lambda: loss_fwd(f, y, sigma, *drawn, None, False)),
        "edm_loss fwd in training": (3 * e, lambda: loss_fwd(f, y, sigma, *drawn, None, True)),
        "edm_loss bwd": (2 * e, lambda: planned(loss.edm_loss_bwd)(sigma, f, None, DTYPE)),
        "euler_step": (12, lambda: planned(euler.euler_step_fwd)(z, z, None, None, 1.0, 0.5)),
    }
    for name, (bytes_each, launch) in launches.items():
        yield name, Call(launch, bytes_each, N * T * D, "")


def classes(V: int) -> Iterator[tuple[str, Call]]:
    """Cross-entropy over rows of logits, which are read twice; the gradient is written."""
    from dblocks.ops._chunked_cross_entropy import launch_rows

    R, padded = LOGITS // V, -(-V // 16) * 16  # padded as by the head
    logits, grad = (meta(R, padded, dtype=t)[:, :V] for t in (torch.float32, DTYPE))
    target = meta(R, dtype=torch.int64)
    launch = lambda: launch_rows(logits, None, target, meta(R), grad, in_place=False)
    yield "cross_entropy", Call(launch, 8 + DTYPE.itemsize, R * V, "")


def calls(name: str, width: int) -> dict[str, Call]:
    """The calls at a width that belong to the family of `name`."""
    op = name.partition(" ")[0]
    if op == "cross_entropy":
        return dict(classes(width))
    if op in ("noise_inject", "edm_denoise", "edm_loss", "euler_step"):
        return dict(diffusion(width))
    return dict(norms(width))


def launch_of(call: Call) -> Caught:
    """The launch of a call."""
    return next(c for c in check.catch(call.launch) if call.kernel in c.fn.__name__)


def launch_at(name: str, width: int) -> Caught:
    """The launch of a call at a width."""
    return launch_of(calls(name, width)[name])


def segments(kernel: Kernel, launch: Caught, width: int) -> tuple[list[Segment], int]:
    """The segments of code to simulate, and the number of CTAs."""
    code, names = kernel.code, sass.named(launch)
    if not kernel.loops:
        return [Segment(code, 1, False)], kernel.ctas * 2 * ROUNDS
    if "BLOCK_V" in names:
        loops, trips = [kernel.loops[0], kernel.loops[-1]], width // names["BLOCK_V"]
        ctas = kernel.ctas * ROUNDS
    elif "BLOCK_R" in names:
        loops = [max(kernel.loops, key=lambda loop: loop[1] - loop[0])]
        trips = -(-min(names["chunk"], names["L"]) // names["BLOCK_R"])
        ctas = min(-(-launch.grid[0] // sass.SMS), max(ROUNDS * kernel.ctas, MIN_CTAS))
        ctas = ctas if trips < LONG_TRIPS else min(ctas, kernel.ctas)
    else:  # elementwise code with an inner loop, such as an exact division
        return [Segment(code, 1, False)], kernel.ctas * 2 * ROUNDS
    parts, at = [], 0
    for begin, end in loops:
        parts += [Segment(code[at:begin], 1, True), Segment(code[begin : end + 1], trips, False)]
        at = end + 1
    return [*parts, Segment(code[at:], 1, True)], ctas


def useful(call: Call, kernel: Kernel, parts: list[Segment], launch: Caught) -> float:
    """The fraction of the simulated traffic that is not masked."""
    simulated = sum(sass.moved(s.code, kernel.warps) * s.repeat for s in parts if not s.in_l2)
    return min(1.0, call.bytes_each * call.elements / launch.grid[0] / simulated)


def model(name: str, width: int) -> Modelled:
    """Compiles a call at a width and runs the model on it."""
    call = calls(name, width)[name]
    launch = launch_of(call)
    kernel = sass.compiled(launch)
    parts, ctas = segments(kernel, launch, width)
    result = sim.run(kernel, parts, ctas, scale=useful(call, kernel, parts, launch))
    return Modelled(result.of_copy, result.clocks / ctas, kernel)


def group_grads_launches() -> tuple[Caught, Caught]:
    """The launches of the backward for one sample and of the following sums."""
    N, T, D = GROUP_SHAPE
    found = dict(norms(D, N, N * T * D))
    return launch_of(found["adaln bwd"]), launch_of(found["adaln group_grads"])


def group_grads_on_top() -> tuple[float, float]:
    """Time of group_grads_kernel relative to that of the preceding backward, at GROUP_SHAPE.

    First with sums read from DRAM, then as if all of them were still in L2.
    """
    N, T, D = GROUP_SHAPE
    backward, sums = group_grads_launches()
    call = dict(norms(D, N, N * T * D))["adaln bwd"]
    kernel = sass.compiled(backward)
    parts, _ = segments(kernel, backward, D)
    scale = useful(call, kernel, parts, backward)
    before = sim.run(kernel, parts, -(-backward.grid[0] // sass.SMS), scale=scale)

    kernel, names = sass.compiled(sums), sass.named(sums)
    begin, end = max(kernel.loops, key=lambda loop: loop[1] - loop[0])
    trips = -(-names["num_chunks"] // names["BLOCK_C"])
    found = []
    for in_l2 in (False, True):
        parts = [
            Segment(kernel.code[:begin], 1, in_l2),
            Segment(kernel.code[begin : end + 1], trips, in_l2),
            Segment(kernel.code[end + 1 :], 1, False),
        ]
        on_top = sim.run(kernel, parts, -(-sums.grid[0] // sass.SMS))
        found.append(on_top.clocks / before.clocks)
    return found[0], found[1]
