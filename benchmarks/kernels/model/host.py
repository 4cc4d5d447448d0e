"""Host time per call in microseconds: Triton's launch code with a driver that does nothing.

CPU tensors replace GPU tensors: memory comes from malloc instead of CUDA's caching allocator (1 to
2 us more per output), nothing is enqueued on a stream (2 to 5 us per kernel), and eager PyTorch
computes on a few elements. The figures compare host times only.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import driver

import dblocks.functional as D
from benchmarks.kernels import check
from dblocks.ops import _dispatch

N, T, W = 4, 4, 768  # small, so that the arithmetic costs little
DEVICE = {
    "max_shared_mem": 232448, "warpSize": 32, "max_num_regs": 65536, "multiprocessor_count": 132,
}  # fmt: skip
CALLS, ROUNDS = 300, 9

Call = Callable[[], Any]


class Driver:
    """The part of a driver that Triton calls before a launch."""

    launcher_cls = staticmethod(lambda *_: lambda *_, **__: None)
    binary_ext = "cubin"
    utils = mock.Mock(
        load_binary=lambda *_: (1, 1, 64, 0, 1024),  # module, function, registers, spills, threads
        get_device_properties=lambda _: DEVICE,
    )
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_current_target = staticmethod(lambda: check.TARGETS["sm_90"])
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
    get_device_interface = staticmethod(lambda: torch.cuda)
    is_active = staticmethod(lambda: True)


class Timed(NamedTuple):
    """A call of dblocks, and the same computation by others."""

    name: str
    ours: Call
    others: dict[str, Call]


def both_ways(call: Call, leaves: Sequence[Tensor], up: Tensor) -> Call:
    """Forward and backward."""

    def run() -> None:
        outputs = call()
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(several, list(leaves), [up] * len(several))

    return run


def eager(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaln in eager PyTorch."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, (W,)), 1 + scale[:, None])


def eager_residual(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """residual_adaln in eager PyTorch."""
    added = torch.addcmul(x, gate[:, None], branch)
    return added, eager(added, shift, scale)


def calls() -> list[Timed]:
    """All calls to time."""
    x, branch, up = (torch.randn(N, T, W) for _ in range(3))
    m, sigma = torch.randn(N, 3 * W).chunk(3, -1), torch.rand(N) + 0.5
    xg, bg, *mg = (t.detach().clone().requires_grad_() for t in (x, branch, *m))
    q = torch.randn(1, 2, 8, 16)
    qg = q.clone().requires_grad_()
    one, every = (xg, *mg[1:]), (xg, bg, *mg)
    ours = functools.partial
    adaln = ours(D.adaln, impl="triton")
    rms = both_ways(lambda: adaln(*one, norm="rms"), one, up)
    residual = ours(D.residual_adaln, impl="triton")
    attention = ours(D.doubled_attention, impl="triton")
    return [
        Timed("adaln, no gradient", lambda: adaln(x, *m[1:]), {"eager": lambda: eager(x, *m[1:])}),
        Timed(
            "adaln forward + backward",
            both_ways(lambda: adaln(*one), one, up),
            {"eager": both_ways(lambda: eager(*one), one, up)},
        ),
        Timed("adaln of RMS norm, forward + backward", rms, liger(one, up)),
        Timed(
            "residual_adaln forward + backward",
            both_ways(lambda: residual(*every), every, up),
            {"eager": both_ways(lambda: eager_residual(*every), every, up)},
        ),
        Timed("noise_inject", lambda: D.noise_inject(x, sigma, 1, impl="triton"), {}),
        Timed("edm_loss", lambda: D.edm_loss(x, branch, sigma, 1, impl="triton"), {}),
        Timed("euler_step", lambda: D.euler_step(x, branch, 1.0, 0.5, impl="triton"), {}),
        Timed("doubled_attention", lambda: attention(q, q, q), {}),
        Timed(
            "doubled_attention forward + backward",
            both_ways(lambda: attention(qg, qg, qg), [qg], q),
            {},
        ),
    ]


def liger(leaves: Sequence[Tensor], up: Tensor) -> dict[str, Call]:
    """Liger's modulated RMS norm, forward and backward, if it is installed."""
    try:
        from liger_kernel.ops.modulated_rms_norm import (  # pyright: ignore[reportMissingImports]
            LigerModulatedRMSNormFunction as Liger,
        )
    except ImportError as error:
        print(f"liger absent: {error}")
        return {}
    x, shift, scale = leaves
    options = (1e-6, 0.0, "llama", False)
    return {"liger": both_ways(lambda: Liger.apply(x, None, shift, scale, *options), leaves, up)}


def microseconds(runs: dict[str, Call], calls: int, rounds: int) -> dict[str, float]:
    """The best round of each call, interleaved."""
    for run in runs.values():
        for _ in range(5):
            run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            for _ in range(calls):
                run()
            best[name] = min(best[name], (time.process_time() - began) / calls * 1e6)
    return best


def main(calls_a_round: int = CALLS, rounds: int = ROUNDS) -> int:
    """Prints a line per call."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    driver.set_active(Driver())  # pyright: ignore[reportArgumentType]
    print("Microseconds of processor time a call on the host, best round; no GPU takes part\n")
    # The ops accept CPU tensors if the interpreter is on.
    with mock.patch.object(_dispatch, "INTERPRETED", True):
        for timed in calls():
            found = microseconds({"dblocks": timed.ours, **timed.others}, calls_a_round, rounds)
            figures = "  ".join(f"{name} {us:6.1f}" for name, us in found.items())
            print(f"{timed.name:40} {figures}", flush=True)
    return 0
