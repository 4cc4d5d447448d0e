"""A vision transformer that classifies by denoising a label embedding.

The target is the embedding of the image's class; its noisy form takes the place of the class token.
The same network runs end to end as a plain ViT, the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks import Batch, DiffusionBlocks, unwrapped
from dblocks.models._images import (
    ImageModelConfig,
    check_floating,
    check_label_values,
    check_labels,
    check_pairs,
    entry,
)
from dblocks.nn import (
    ConditioningKind,
    LabelEmbedding,
    Modulation,
    NoiseEmbedding,
    Norm,
    TransformerLayer,
    conditioning_of,
)
from dblocks.sample import grid_of, initial_noise, sample_logits
from dblocks.schedule import NoiseLevel

INIT_STD = 0.02  # class token and null image; Dosovitskiy et al. 2021
# As large as the patch tokens that Xavier weights make of pixels: at .02 the layers hardly see
# positions, and blocks learn digits much more slowly (tried).
POSITION_STD = 0.5


@dataclass(frozen=True)
class ViTConfig(ImageModelConfig):
    """Sizes of a `ViT`; the defaults are those for CIFAR-size images."""

    conditioning: ConditioningKind = "dit"
    """How layers are conditioned on the noise: dit, official, or none for the classical ViT."""
    image_drop: float = 0.0
    """Probability of training without the image, for guidance."""
    embed_scale: float = 1.0
    """Norm of a label's embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        conditioning_of(self.conditioning)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {self.num_classes}")
        if not 0 < self.embed_scale < math.inf:
            raise ValueError(f"embed_scale must be positive and finite, got {self.embed_scale}")
        if not 0 <= self.image_drop < 1:
            raise ValueError(f"image_drop must be in [0, 1), got {self.image_drop}")

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        height, width = self.height_width
        return (height // self.patch_size) * (width // self.patch_size)


class Hidden(NamedTuple):
    """What the layers leave for the readout."""

    x: Tensor
    """Tokens [N, 1 + P, D]."""
    cond: Tensor | None
    """Conditioning vector [N, cond_dim]; None for the null conditioning."""


class ViT(nn.Module):
    """A vision transformer; `DiffusionBlocks(ViT(config), ...)` trains it in blocks.

    As denoiser: the noisy label embedding, scaled by c_in, is the first token, the patches are the
    others; `m = c_skip*z + c_out*LN(h)[:, 0]` and `logits = Linear(m*(1 + scale) + shift)`, with
    shift and scale from the noise level; the loss is their cross-entropy. The denoised estimate is
    the expectation of the label embedding under the logits.

    End to end, `vit(images)` is the plain classifier with a learned class token and, where the
    layers are conditioned on noise, the null conditioning.

    Positions start from a normal of deviation .5, class token and null image of .02, linear layers
    Xavier uniform, modulations and the classifier at zero, but for gates at `gate_init`.

    Args:
        config: the sizes.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        D, kind = config.width, config.conditioning
        patch = config.patch_size
        self.target_embedding = LabelEmbedding(config.num_classes, D, config.embed_scale)
        self.patches = nn.Conv2d(config.channels, D, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, 1 + config.num_patches, D))
        self.class_token = nn.Parameter(torch.empty(1, D))
        self.null_image = (
            nn.Parameter(torch.empty(1, config.num_patches, D)) if config.image_drop else None
        )
        conditioned = kind != "none"
        self.noise_embedding = (
            NoiseEmbedding(conditioning_of(kind).width(D)) if conditioned else None
        )
        hidden_dim = int(D * config.mlp_ratio)
        self.layers = nn.ModuleList(
            TransformerLayer(D, config.heads, hidden_dim, kind=kind, gate_init=config.gate_init)
            for _ in range(config.depth)
        )
        self.norm = Norm(D, "none")
        self.modulation = Modulation(D, 2, kind) if conditioned else None
        self.classifier = nn.Linear(D, config.num_classes)
        self.loss_kind: Literal["cross_entropy", "l2"] = "cross_entropy"
        self.condition_drop = config.image_drop
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """The plain classifier: images [N, C, H, W] to logits [N, num_classes], float32."""
        token = self.class_token.expand(images.shape[0], -1)
        x = self._tokens(token, self.embed_condition({"images": images}))
        for layer in self.layers:
            x = layer(x, None)
        return self._classify(self._normed_token(x), None)

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """One noise level a sample: [N]."""
        labels, images = _entry(batch, "labels"), _entry(batch, "images")
        check_labels(labels)
        self._check_images(images)
        check_pairs(images, labels)
        return (len(labels),)

    def embed_target(self, batch: Batch) -> Tensor:
        """Embeddings of `batch["labels"]` [N], float32 [N, D]."""
        labels = _entry(batch, "labels")
        check_labels(labels)
        check_label_values(labels, self.config.num_classes)
        return self.target_embedding(labels)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Tensor:
        """Patch tokens of `batch["images"]` [N, C, H, W], with positions: [N, P, D].

        Samples with `drop` [N] get the learned null image instead.
        """
        images = _entry(batch, "images")
        self._check_images(images)
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        if drop is not None:
            if self.null_image is None:
                raise ValueError(
                    "guidance needs a model trained without some images; "
                    "set ViTConfig.image_drop above 0"
                )
            tokens = torch.where(drop[:, None, None], self.null_image.to(tokens.dtype), tokens)
        return tokens + self.positions[:, 1:]

    def run_layers(
        self,
        layers: Iterable[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        condition: Tensor,
    ) -> Hidden:
        """Runs `layers` on the noisy label embedding [N, D] beside the patch tokens."""
        cond = None if self.noise_embedding is None else self.noise_embedding(level.c_noise)
        x = self._tokens(z_in, condition)
        for layer in layers:
            x = layer(x, cond)
        return Hidden(x, cond)

    def read_out(self, hidden: Hidden, z: Tensor, level: NoiseLevel) -> Tensor:
        """Logits [N, num_classes], float32."""
        f = self._normed_token(hidden.x)
        m = F.edm_denoise(f, z, level.sigma, sigma_data=level.sigma_data)
        return self._classify(m, hidden.cond)

    def denoise(self, prediction: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """The expected label embedding `softmax(logits) @ rows`, [N, D]."""
        with torch.autocast(z.device.type, enabled=False):
            return prediction.softmax(-1) @ self.target_embedding.rows().to(prediction.dtype)

    def score(
        self, hidden: Hidden, z: Tensor, level: NoiseLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """Cross-entropy of each sample, [N]."""
        logits = self.read_out(hidden, z, level)
        return nnf.cross_entropy(logits, batch["labels"], reduction="none")

    def _tokens(self, first: Tensor, patches: Tensor) -> Tensor:
        first = first[:, None] + self.positions[:, :1]
        return torch.cat([first.to(patches.dtype), patches], dim=1)

    def _normed_token(self, x: Tensor) -> Tensor:
        return self.norm.modulate(x[:, :1], None, None)[:, 0]

    def _classify(self, m: Tensor, cond: Tensor | None) -> Tensor:
        # The logits are float32 whatever the layers' dtype, and a matter of one row a sample.
        with torch.autocast(m.device.type, enabled=False):
            m = m.to(torch.promote_types(m.dtype, torch.float32))
            if self.modulation is not None:
                shift, scale = self.modulation(cond, m.shape[0])
                m = m * (1 + scale) + shift
            weight, bias = self.classifier.weight, self.classifier.bias
            return nnf.linear(m, weight.to(m.dtype), bias.to(m.dtype))

    def _init_weights(self) -> None:
        nn.init.xavier_uniform_(self.patches.weight.view(self.patches.weight.shape[0], -1))
        for tensor in (self.patches.bias, self.classifier.weight, self.classifier.bias):
            if tensor is not None:
                nn.init.zeros_(tensor)
        nn.init.normal_(self.positions, std=POSITION_STD)
        for tensor in (self.class_token, self.null_image):
            if tensor is not None:
                nn.init.trunc_normal_(tensor, std=INIT_STD)

    def _check_images(self, images: Tensor) -> None:
        expected = (self.config.channels, *self.config.height_width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape [N, C, H, W] = [N, {', '.join(map(str, expected))}], "
                f"got {list(images.shape)}; reshape them, or see ViTConfig.image_size and channels"
            )
        check_floating(images)


def _entry(batch: Batch, key: str) -> Tensor:
    return entry(batch, key, of="a ViT", sampling="the images")


def classify(
    model: DiffusionBlocks,
    images: Tensor,
    *,
    num_steps: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    noise: Literal["paper", "unit_variance"] = "paper",
    generator: torch.Generator | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Logits of a block-wise trained `ViT`: Euler steps from noise, the last call's logits.

    Args:
        model: the blocks of a `ViT`, also inside torch.compile's or AveragedModel's wrapper.
        images: [N, C, H, W].
        num_steps: steps of the equal-mass grid; the number of blocks by default.
        sigmas: a grid to use instead.
        noise: kind of the initial state, see `initial_noise`.
        generator: source of the initial state, on any device; by default that of the images'
            device.
        guidance_scale: weight of the image against the null image; 1 is no guidance.

    Returns:
        float32 [N, num_classes].

    Raises:
        TypeError: `model` is no `DiffusionBlocks`.
        ValueError: both `num_steps` and `sigmas` are given, or `num_steps` is not positive.
    """
    model = unwrapped(model)
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(
            f"model must be the DiffusionBlocks of a ViT, got {type(model).__name__}; "
            "a plain classifier is called as vit(images)"
        )
    grid = grid_of(model, num_steps, sigmas)
    schedule = model.config.noise_schedule
    config: Any = model.base_model.config  # pyright: ignore[reportAttributeAccessIssue]
    shape = (images.shape[0], config.width)
    device = images.device if generator is None else generator.device
    z = initial_noise(shape, schedule, kind=noise, generator=generator, device=device)
    z = z.to(images.device)
    return sample_logits(model, z, grid, images=images, guidance_scale=guidance_scale)
