"""A target that is a tensor of the batch itself, such as an image."""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.blocks.targets.base import Batch, CheckedBatch, LossKind, Target, missing
from dblocks.schedules import NoiseLevel


class L2Target(Target):
    """The tensor `batch[key]` [N, ...], under the L2 loss of the EDM preconditioning.

    The features of the network are F, of the shape of the target; the estimate is `c_skip*z +
    c_out*F`. There is one noise level per sample.

    For one level per segment, override `sigma_shape` and `score`. `F.edm_loss` averages over all
    but the first dimension, and noise depends only on the index of an element, so pass segments as
    samples:

        F.edm_loss(f.reshape(N*S, T//S, D), y.reshape(N*S, T//S, D), sigma.reshape(-1), seed,
                   sigma_data=level.sigma_data).view(N, S)

    Args:
        key: the target's key in the batch.
    """

    loss_kind: LossKind = "l2"

    def __init__(self, key: str) -> None:
        self.key = key

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Target.reads`."""
        return (self.key,)

    def check(self, batch: Batch) -> Batch:
        """See `Target.check`; the target must be floating point."""
        value = batch.get(self.key)
        if not isinstance(value, Tensor):
            raise missing(batch, self.key, f"{{{self.key!r}: [N, ...]}} and what the network reads")
        if not value.is_floating_point():
            raise TypeError(
                f"{self.key} must be floating point, got {value.dtype}; convert and scale them "
                "first"
            )
        return CheckedBatch(batch)

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """[N]."""
        return (len(batch[self.key]),)

    def embed(self, batch: Batch) -> Tensor:
        """The target itself, float32 (float64)."""
        value = batch[self.key]
        return value if value.dtype == torch.float64 else value.float()

    def predict(self, features: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """F, the features themselves."""
        return features

    def denoise(self, prediction: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """`c_skip*z + c_out*F`."""
        return F.edm_denoise(prediction, z, level.sigma, sigma_data=level.sigma_data)

    def score(
        self, features: Tensor, z: Tensor, level: NoiseLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """The L2 loss of F of each sample, [N]."""
        f = self.predict(features, z, level)
        return F.edm_loss(f, y, level.sigma, seed, sigma_data=level.sigma_data)
