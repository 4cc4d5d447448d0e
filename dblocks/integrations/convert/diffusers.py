"""diffusers' DiT as a network of blocks: a denoiser already, it keeps its own modulation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dblocks import functional as F
from dblocks.blocks import Batch
from dblocks.integrations.convert.denoisers import denoiser
from dblocks.integrations.convert.network import Converted, check_some
from dblocks.models.images import ImageTarget
from dblocks.models.patches import unpatchify
from dblocks.schedules import EDMSchedule, NoiseLevel

TIMESTEPS = 1000  # of the noise that DiT was made for, and what its embedding resolves
LABEL_DROP = 0.1  # Peebles and Xie 2023


class Hidden(NamedTuple):
    """The output of the layers."""

    x: Tensor
    """Tokens [N, P, D]."""
    timestep: Tensor
    """Timesteps, float [N]."""
    labels: Tensor
    """Labels, int64 [N]; the null class where dropped."""
    grid: tuple[int, int]
    """Numbers of rows and columns of patches."""
    dtype: torch.dtype
    """The dtype of the noisy image."""


class ConvertedDiT(Converted):
    """diffusers' `DiTTransformer2DModel`, for `DiffusionBlocks` with a `NoiseSchedule`.

    The target is the image or latent. The network is given c_in*z, and as timestep

        1000 * (ln sigma - ln sigma_min) / (ln sigma_max - ln sigma_min) ;

    its first C channels are F of the preconditioning, and a second half for variances, if there is
    one, is not used. Its layers have their own embeddings of timestep and label. The final layer
    reads those of the first layer, which other blocks do not train: here it has a copy.

    A batch holds "images" and "labels"; labels are dropped with probability .1 where the model has
    a null class.

    Args:
        model: the user's model.
        layers: its layers by name.
        schedule: the noise schedule.
    """

    reads = ()
    call_reads = ("labels",)

    def __init__(self, model: Any, layers: Mapping[str, nn.Module], schedule: EDMSchedule) -> None:
        super().__init__(model, layers, model.inner_dim, conditioned=False)
        first: Any = next(iter(layers.values()))
        self.final_embedding: Any = copy.deepcopy(first.norm1.emb)
        embedder = self.final_embedding.class_embedder
        self.num_classes: int = embedder.num_classes
        self.has_null = embedder.embedding_table.num_embeddings > self.num_classes
        self.condition_drop = LABEL_DROP if self.has_null else 0.0
        self.channels: int = model.config.in_channels
        self.lowest = math.log(schedule.sigma_min)
        self.span = math.log(schedule.sigma_max) - self.lowest

    @property
    def target(self) -> ImageTarget:
        """The image or latent itself."""
        patch = cast(Any, self.model).config.patch_size
        return ImageTarget(self.channels, patch, self.num_classes)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Tensor:
        """`batch["labels"]` [N], the null class where `drop` [N] is true."""
        labels = self.target.labels(batch)
        check_some(labels)
        if drop is None:
            return labels
        if not self.has_null:
            raise ValueError(
                "guidance needs a model with a null class, got one trained without label dropout; "
                "set guidance_scale to 1"
            )
        return labels.masked_fill(drop, self.num_classes)

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Tensor
    ) -> Hidden:
        """Runs `layers` on the patches of the noisy image [N, C, H, W]."""
        model: Any = self.model
        timestep = TIMESTEPS * (level.sigma.log() - self.lowest) / self.span
        patch = model.config.patch_size
        grid = (z_in.shape[2] // patch, z_in.shape[3] // patch)
        x = model.pos_embed(z_in.to(model.proj_out_2.weight.dtype))
        for layer in layers:
            if self.checkpointing:
                x = checkpoint(_run_layer, layer, x, timestep, condition, use_reentrant=False)
            else:
                x = _run_layer(layer, x, timestep, condition)
        return Hidden(x, timestep, condition, grid, z_in.dtype)

    def features(self, hidden: Hidden) -> Tensor:
        """F [N, C, H, W]."""
        return self._features(hidden, self.final_embedding)

    def _features(self, hidden: Hidden, embedding: Any) -> Tensor:
        model: Any = self.model
        x = hidden.x
        with _all_labels(embedding):
            cond = embedding(hidden.timestep, hidden.labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(nnf.silu(cond)).chunk(2, dim=1)
        x = F.adaln(x, shift, scale, eps=model.norm_out.eps)
        image = unpatchify(model.proj_out_2(x), hidden.grid, model.config.patch_size)
        return image[:, : self.channels].to(hidden.dtype)

    def compare(self) -> tuple[Tensor, Tensor]:
        """See `Converted.compare`; compares images at two timesteps."""
        model: Any = self.model
        side, like = model.config.sample_size, model.proj_out_2.weight
        numbers = torch.arange(2 * self.channels * side**2, device=like.device)
        z = numbers.float().sin().view(2, self.channels, side, side).to(like.dtype)
        timestep = torch.tensor([TIMESTEPS // 8, TIMESTEPS // 2], device=like.device)
        labels = torch.arange(2, device=like.device) % self.num_classes
        x = model.pos_embed(z)
        for layer in self.layers:
            x = _run_layer(layer, x, timestep, labels)
        patches = side // model.config.patch_size
        hidden = Hidden(x, timestep, labels, (patches, patches), z.dtype)
        own = model(z, timestep=timestep, class_labels=labels).sample
        # The model reads that of the first layer; ours was a copy of it before training.
        first: Any = next(iter(self.layers))
        return own[:, : self.channels], self._features(hidden, first.norm1.emb)

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """None: the model has no loss other than denoising."""
        raise ValueError("a DiT has no loss besides that of denoising; set clean_loss_weight to 0")


def image_model(model: Any, layers: Mapping[str, nn.Module], schedule: EDMSchedule) -> Converted:
    """A DiT or another denoiser of diffusers.

    Raises:
        ValueError: the model's class is not supported.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if isinstance(model, DiTTransformer2DModel):
        return ConvertedDiT(model, layers, schedule)
    return denoiser(model, layers)


def _run_layer(layer: nn.Module, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    own: Any = layer
    with _all_labels(own.norm1.emb):
        return own(x, timestep=timestep, class_labels=labels)


@contextmanager
def _all_labels(embedding: Any) -> Iterator[None]:
    """Turns off label dropout in the embedding: labels are dropped once for all layers."""
    embedder = embedding.class_embedder
    training, embedder.training = embedder.training, False
    try:
        yield
    finally:
        embedder.training = training
