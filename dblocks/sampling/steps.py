"""Steps along the probability flow, for images, classes, text and the diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from dblocks import functional as F

Callback = Callable[[dict[str, Any]], object]
Sampler = Literal["euler", "heun"]


class Steps:
    """The model calls of a sampler on a grid of levels, and the step after each call.

    Karras et al. 2022, algorithm 1 without churn. With d = (z - denoised)/sigma,

        euler   z_next = z + (sigma_next - sigma) d
        heun    z_next = z + (sigma_next - sigma) (d + d')/2,   d' at Euler's z_next

    In both, the step from the last level to level 0 is an Euler step, which returns denoised, so n
    levels need n model calls with euler and 2n - 1 with heun. Heun's method keeps d between calls:
    use one `Steps` for one sample at a time.

    Args:
        grid: the levels, descending and above 0.
        sampler: "euler" or "heun".

    Raises:
        ValueError: there is no such sampler.
    """

    def __init__(self, grid: Sequence[float], sampler: Sampler = "euler") -> None:
        check_sampler(sampler)
        self.grid = list(grid)
        self.heun = sampler == "heun"
        again = 2 if self.heun else 1
        self.calls = [i for i in range(len(self.grid)) for _ in range(again if i else 1)]
        """The index in the grid of each call's level."""
        self._held: tuple[Tensor, Tensor, float] | None = None

    def sigma(self, call: int) -> float:
        """The level of a call."""
        return self.grid[self.calls[call]]

    def corrects(self, call: int) -> bool:
        """Whether a call is the second one in a step of Heun's method."""
        return self.heun and call % 2 == 1

    def after(self, call: int, z: Tensor, denoised: Tensor) -> Tensor:
        """The state of the next call; after the last one, `denoised`.

        Args:
            call: index of the call.
            z: the state passed to the model, [N, ...].
            denoised: the result of the call.

        Raises:
            RuntimeError: it is the second call of a step without the first.
        """
        sigma = self.sigma(call)
        if self.corrects(call):
            if self._held is None:
                raise RuntimeError(
                    f"call {call} of heun's method must follow the first call of its step, "
                    "which was not made; begin with a call of even index"
                )
            (start, slope, before), self._held = self._held, None
            return start + (sigma - before) / 2 * (slope + (z - denoised) / sigma)
        if call + 1 == len(self.calls):
            return denoised
        if self.heun:
            self._held = z, (z - denoised) / sigma, sigma
        return F.euler_step(z, denoised, sigma, self.sigma(call + 1))

    def follow(
        self,
        denoise: Callable[[Tensor, int], Tensor],
        z: Tensor,
        callback: Callback | None = None,
    ) -> Tensor:
        """Makes all calls but the last, and returns the state for the last call.

        Args:
            denoise: `denoise(z, call) -> denoised`.
            z: state at the first level.
            callback: see `report`.
        """
        for call in range(len(self.calls) - 1):
            denoised = denoise(z, call)
            self.report(callback, call, z, denoised)
            z = self.after(call, z, denoised)
        return z

    def report(self, callback: Callback | None, call: int, z: Tensor, denoised: Tensor) -> None:
        """Calls `callback` after the first call at a level with 'x', 'i', 'sigma', 'sigma_hat' and
        'denoised', as k-diffusion does.
        """
        if callback is not None and not self.corrects(call):
            i, sigma = self.calls[call], self.sigma(call)
            callback({"x": z, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})


def check_sampler(sampler: str) -> None:
    """Raises ValueError unless `sampler` is one of `Sampler`."""
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler must be one of {get_args(Sampler)}, got {sampler!r}")
