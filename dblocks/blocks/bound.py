"""A block's prediction under a condition that is embedded once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dblocks.blocks.model import BlockModel
from dblocks.blocks.sharding import within
from dblocks.blocks.sigmas import check_sigma, sigma_for
from dblocks.blocks.targets.base import Batch
from dblocks.blocks.targets.entries import check_call
from dblocks.config import check_finite
from dblocks.kernels.reference import in_forward_mode
from dblocks.schedules import Schedule

if TYPE_CHECKING:
    from dblocks.blocks.denoiser import Denoiser


class Predictions:
    """The part of a `Denoiser` that predicts."""

    index: int | None

    def forward(
        self,
        z: Tensor,
        sigma: Tensor,
        *,
        block: int | None = None,
        guidance_scale: float = 1.0,
        **cond: Any,
    ) -> Tensor:
        """The denoised estimate of the clean target from a noisy one.

        Args:
            z: noisy target [N, ...].
            sigma: its noise level: a number, 0-d, [N], or [N, S] for z [N, T, D], one for each of
                S segments of T/S tokens.
            block: the block to run; by default the only one held here, or the one that owns sigma,
                compared in the dtype of sigma; the host looks it up, which synchronises where sigma
                is on a GPU.
            guidance_scale: 1 is no guidance; see `BoundDenoiser`.
            **cond: what the network's `embed_condition` reads, such as `images=`.

        Returns:
            denoised [N, ...], float32.

        Raises:
            ValueError: the levels belong to several blocks, `block` is out of range, or nothing
                reads one of the keywords.
        """
        block = self.index if block is None else block
        return self.bind(guidance_scale=guidance_scale, **cond)(z, sigma, block=block)

    def logits(
        self,
        z: Tensor,
        sigma: Tensor,
        *,
        block: int | None = None,
        guidance_scale: float = 1.0,
        **cond: Any,
    ) -> Tensor:
        """As `forward`, but the prediction itself: logits, or F for an L2 target."""
        block = self.index if block is None else block
        return self.bind(guidance_scale=guidance_scale, **cond).logits(z, sigma, block=block)

    def bind(self, *, guidance_scale: float = 1.0, **cond: Any) -> BoundDenoiser:
        """The denoiser with its condition bound, which is embedded once for all calls."""
        denoiser: Any = self
        if not torch.compiler.is_compiling():  # a call may be one graph
            denoiser.prepare()
        return BoundDenoiser(denoiser, cond, guidance_scale)


class BoundDenoiser:
    """A denoiser with a bound condition: `bound(z, sigma) -> denoised`, for k-diffusion samplers.

    The condition is embedded at the first call and kept for the following ones. With a
    `guidance_scale` g other than 1, the prediction is `uncond + g*(cond - uncond)`: of denoised
    estimates for the call itself, of logits for `logits`. At scales 1 and 0 it is exactly one of
    the two predictions, in one call of the network.
    """

    def __init__(self, denoiser: Denoiser, cond: Batch, guidance_scale: float = 1.0) -> None:
        model, _ = denoiser.parts(denoiser.any_block())
        check_call(model, cond, model.target)
        self.denoiser = denoiser
        self.cond = cond
        self.guidance_scale = check_finite("guidance_scale", guidance_scale)
        self._embedded: dict[tuple[int, bool], Any] = {}

    def __call__(self, z: Tensor, sigma: Tensor, *, block: int | None = None) -> Tensor:
        """The estimate of y from z [N, ...] at sigma, 0-d, [N] or [N, S]; float32.

        With a `MaskSchedule`, z holds tokens and sigma is t; the estimate holds probabilities.
        """
        return self._guided(z, sigma, block, logits=False)

    def logits(self, z: Tensor, sigma: Tensor, *, block: int | None = None) -> Tensor:
        """The prediction itself: logits, or F for an L2 target."""
        return self._guided(z, sigma, block, logits=True)

    def _guided(self, z: Tensor, sigma: Tensor, block: int | None, *, logits: bool) -> Tensor:
        schedule: Schedule = self.denoiser.config.schedule
        if z.is_complex():
            raise TypeError(f"z must be real, got {z.dtype}; pass real numbers as channels")
        z = schedule.state(z)
        if not isinstance(sigma, Tensor):
            if isinstance(sigma, bool | str):
                raise TypeError(f"sigma must be a number or a tensor, got {sigma!r}")
            sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        check_sigma(z, sigma, masks=schedule.corruption == "masks")
        # The block that owns a level is decided in the level's own dtype, before conversion.
        if block is None:
            block = self._owner(sigma)
        level = schedule.level(sigma_for(z, sigma))
        if self.guidance_scale in (0, 1):
            unconditional = self.guidance_scale == 0
            return self._predict(z, level, block, logits=logits, drop=unconditional)
        given = self._predict(z, level, block, logits=logits, drop=False)
        null = self._predict(z, level, block, logits=logits, drop=True)
        return null + self.guidance_scale * (given - null)

    def _predict(self, z: Tensor, level: Any, block: int, *, logits: bool, drop: bool) -> Tensor:
        predict = within(self.denoiser, self._predict_whole)
        return predict(z, level, block, logits=logits, drop=drop)

    def _predict_whole(
        self, z: Tensor, level: Any, block: int, *, logits: bool, drop: bool
    ) -> Tensor:
        model, layers = self.denoiser.parts(block)
        z_in = self.denoiser.config.schedule.scale_in(z, level)
        condition = self._condition(model, z, drop)
        with attention_with_tangents():
            features = model.features(model.run_layers(layers, z_in, level, condition))
            prediction = model.target.predict(features, z, level)
        return prediction if logits else model.target.denoise(prediction, z, level)

    def _condition(self, model: BlockModel, z: Tensor, drop: bool) -> Any:
        # With private parameters each block embeds the condition itself.
        key = (id(model), drop)
        if key not in self._embedded:
            mask = torch.ones(len(z), dtype=torch.bool, device=z.device) if drop else None
            self._embedded[key] = model.embed_condition(self.cond, mask)
        return self._embedded[key]

    def _owner(self, sigma: Tensor) -> int:
        config = self.denoiser.config
        if sigma.numel() == 0:
            return 0
        first, last = torch.aminmax(config.schedule.block_of(sigma, config.num_blocks))
        if first != last:
            raise ValueError(
                f"sigma must lie in one block, got levels of blocks {int(first)} to {int(last)}; "
                "make one call per block"
            )
        return int(first)


def attention_with_tangents() -> AbstractContextManager:
    """Selects PyTorch's math attention in forward-mode differentiation, which no other supports."""
    return sdpa_kernel(SDPBackend.MATH) if in_forward_mode() else nullcontext()
