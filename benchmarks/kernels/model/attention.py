"""The loops of doubled_attention: the modelled speed of their matrix products, and its limits."""

from typing import NamedTuple

import torch

from benchmarks.kernels import cases, check, machine_code
from benchmarks.kernels.check import Caught
from benchmarks.kernels.model import sass, sim
from benchmarks.kernels.model.sass import Kernel
from benchmarks.kernels.model.sim import Segment

DTYPE = torch.bfloat16
PRODUCTS = {"fwd": 2, "bwd_dq": 3, "bwd_dkv": 4}
PASSES = (10, 50)  # passes of a loop; the difference is its steady state
LATENCIES = {"latency": 600, "l2_latency": 300, "launch": 10}


class Loop(NamedTuple):
    """A loop with matrix products: `tflops` counts all products of the tile, masked or not."""

    tflops: float
    of_matrix_units: float


class Modelled(NamedTuple):
    """An attention kernel, its loops in the order of the code, and ptxas' remarks."""

    kernel: Kernel
    loops: list[Loop]
    serialized: str

    @property
    def best(self) -> float:
        """TFLOP/s of the fastest loop, the one without a mask."""
        return max((loop.tflops for loop in self.loops), default=0.0)


def launch_of(which: str, D: int, block_size: int) -> Caught:
    """The launch of a kernel at a head width; for dkv, the launch for clean keys."""
    name = f"doubled_attention_{which}_kernel"
    caught = check.catch(lambda: cases.attend(D, DTYPE, sass.TARGET, block_size=block_size))
    return next(launch for launch in caught if launch.fn.__name__ == name)


def model(which: str, D: int, block_size: int) -> Modelled:
    """Compiles a kernel and runs the model on its loops."""
    launch = launch_of(which, D, block_size)
    kernel, names = sass.compiled(launch), sass.named(launch)
    operations = PRODUCTS[which] * 2 * names["BLOCK_M"] * names["BLOCK_K"] * D
    loops = []
    for begin, end in kernel.loops:
        body = kernel.code[begin : end + 1]
        if sass.count(body)["HGMMA"] and kernel.ctas:
            clocks = clocks_of_pass(kernel, body)
            tflops = operations / clocks * sass.SMS * sass.CLOCK / 1e12
            loops.append(Loop(tflops, operations / sim.FLOP_A_CLOCK / clocks))
    return Modelled(kernel, loops, machine_code.serialized(kernel.ptx))


def clocks_of_pass(kernel: Kernel, body: list[sass.Instruction]) -> float:
    """Clocks of one CTA for one pass of a loop."""
    few, many = (
        sim.run(kernel, [Segment(body, n, True)], kernel.ctas, **LATENCIES).clocks for n in PASSES
    )
    return (many - few) / (PASSES[1] - PASSES[0]) / kernel.ctas
