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
from torch import Tensor, nn

from dblocks.blocks import (
    Batch,
    ClassTarget,
    DiffusionBlocks,
    Features,
    OutputHead,
    trained_at_top,
    unwrapped,
)
from dblocks.blocks.targets.base import missing
from dblocks.blocks.targets.classes import Head, check_head
from dblocks.models.images import ImageModelConfig
from dblocks.nn import (
    ConditioningKind,
    LabelEmbedding,
    Modulation,
    NoiseEmbedding,
    Norm,
    TransformerLayer,
    conditioning_of,
)
from dblocks.nn.scalars import accept_scalars, number
from dblocks.sampling import initial_noise, product_logits, sample_logits
from dblocks.sampling.levels import grid_of
from dblocks.sampling.steps import Sampler
from dblocks.schedules import NoiseLevel
from dblocks.schedules.random import draw_device

INIT_STD = 0.02  # class token and null image; Dosovitskiy et al. 2021
# The size of patch tokens under Xavier weights: at .02 the layers hardly see positions, and blocks
# learn digits much more slowly (tried).
POSITION_STD = 0.5

Noise = Literal["none", "paper", "unit_variance"]


@dataclass(frozen=True)
class ViTConfig(ImageModelConfig):
    """Sizes of a `ViT`; the defaults are those for CIFAR-size images."""

    conditioning: ConditioningKind = "dit"
    """Convention of conditioning on the noise level: dit, official, or none for the original
    ViT."""
    image_drop: float = 0.0
    """Probability of dropping the image in training, for guidance."""
    embed_scale: float = 1.0
    """Norm of a label's embedding."""
    head: Head = "posterior"
    """Form of the logits: "posterior", a prediction from the image plus the exact log-likelihood of
    the noisy label; or "learned", as published, an output head on the EDM-preconditioned token."""
    noise_scale: float | None = 0.1
    """Initial value of the learned factor of the noisy label, which is added to the class token;
    None: the noisy label replaces the class token, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        conditioning_of(self.conditioning)
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {self.num_classes}")
        if not 0 < self.embed_scale < math.inf:
            raise ValueError(f"embed_scale must be positive and finite, got {self.embed_scale}")
        check_head(self.head)
        if self.noise_scale is not None and not 0 <= self.noise_scale < math.inf:
            raise ValueError(
                f"noise_scale must be None or a finite number >= 0, got {self.noise_scale}"
            )
        if not 0 <= self.image_drop < 1:
            raise ValueError(f"image_drop must be in [0, 1), got {self.image_drop}")

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        height, width = self.height_width
        return (height // self.patch_size) * (width // self.patch_size)


class Hidden(NamedTuple):
    """The result of the layers."""

    x: Tensor
    """Tokens [N, 1 + P, D]."""
    cond: Tensor | None
    """Conditioning vector [N, cond_dim]; None for the null conditioning."""


class ViT(nn.Module):
    """A vision transformer; `DiffusionBlocks(ViT(config), ...)` trains it in blocks.

    As a denoiser, the first token is `class token + a*c_in*z` with the noisy label embedding z and
    a learned scalar a; the others are the patches. With h the first token after the layers, E the
    label embeddings, and shift and scale from the noise level,

        posterior   logits = Linear(LN(h)) + E z / sigma^2
        learned     logits = Linear(m*(1 + scale) + shift),   m = c_skip*z + c_out*LN(h)

    The first is Bayes' rule: the layers learn ln p(class | image), at every level. The loss is the
    cross-entropy of the logits; the denoised estimate is the expected label embedding.

    End to end, `vit(images)` is the plain classifier with a learned class token and, if the layers
    are conditioned on noise, the null conditioning.

    Initialisation: positions normal with std .5, class token and null image .02, linear layers
    Xavier uniform, modulations and the classifier zero, gates `gate_init`.

    Args:
        config: the sizes.
    """

    reads = ()  # in addition to its target's
    call_reads = ("images",)

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (config.channels, *config.height_width)
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
            TransformerLayer(
                D, config.heads, hidden_dim, conditioning=kind, gate_init=config.gate_init
            )
            for _ in range(config.depth)
        )
        self.norm = Norm(D, "none")
        learned = config.head == "learned"
        self.modulation = Modulation(D, 2, kind) if conditioned and learned else None
        self.classifier = nn.Linear(D, config.num_classes)
        self.condition_drop = config.image_drop
        scale = config.noise_scale
        self.noise_scale = None if scale is None else number(scale)
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """The plain classifier: images [N, C, H, W] to logits [N, num_classes], float32."""
        token = self.class_token.expand(images.shape[0], -1)
        x = self._tokens(token, self.embed_condition({"images": images}))
        for layer in self.layers:
            x = layer(x, None)
        return self.target.output_head.logits(self.features(Hidden(x, None)).x)

    @property
    def target(self) -> ClassTarget:
        """The embedding of the image's class."""
        head = OutputHead(self.classifier, modulation=self.modulation)
        return ClassTarget(self.target_embedding, head, self.config.head)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Tensor:
        """Patch tokens of `batch["images"]` [N, C, H, W], with positions: [N, P, D].

        Samples with `drop` [N] get the learned null image instead.
        """
        images = batch.get("images")
        if not isinstance(images, Tensor):
            content = "{'images': [N, C, H, W], 'labels': [N]}, of which sampling needs the images"
            raise missing(batch, "images", content, of="a ViT's")
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
        """Runs `layers` on the noisy label embedding [N, D] and the patch tokens."""
        cond = None if self.noise_embedding is None else self.noise_embedding(level.c_noise)
        if self.noise_scale is not None:
            z_in = self.class_token + self.noise_scale * z_in
        x = self._tokens(z_in, condition)
        for layer in layers:
            x = layer(x, cond)
        return Hidden(x, cond)

    def features(self, hidden: Hidden) -> Features:
        """The first token, normalised, [N, D]."""
        return Features(self.norm.modulate(hidden.x[:, :1], None, None)[:, 0], hidden.cond)

    def _tokens(self, first: Tensor, patches: Tensor) -> Tensor:
        first = first[:, None] + self.positions[:, :1]
        return torch.cat([first.to(patches.dtype), patches], dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        accept_scalars(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
        expected = self.image_shape
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must have shape [N, C, H, W] = [N, {', '.join(map(str, expected))}], "
                f"got {list(images.shape)}; reshape them, or see ViTConfig.image_size and channels"
            )
        if not images.is_floating_point():
            raise TypeError(
                f"images must be floating point, got {images.dtype}; convert and scale them first"
            )
        weights = self.positions.dtype
        autocast = torch.is_autocast_enabled(images.device.type) and images.dtype != torch.float64
        if images.dtype != weights and not autocast:
            raise TypeError(
                f"images must be {weights} as the network's weights, got {images.dtype}; convert "
                "them, or the network, or use torch.autocast"
            )


def classify(
    model: DiffusionBlocks,
    images: Tensor,
    *,
    num_steps: int | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    noise: Noise = "none",
    generator: torch.Generator | None = None,
    guidance_scale: float = 1.0,
    sampler: Sampler = "euler",
) -> Tensor:
    """Classifies images with a `ViT` in blocks.

    By default, log-probabilities of the product of all blocks' predictions, one call each, see
    `product_logits`. If blocks were trained without a `top_share`, or `num_steps` or `sigmas` is
    given, the logits of the last of several Euler (or Heun) steps. Steps begin at 0, the mean of
    the noise at sigma_max, and end near the most likely class; from noise, as published, they end
    in a class sampled from the posterior, which is correct less often. The last call is at
    sigma_min, where the posterior is nearly one class: use these logits for their order, not as
    confidences.

    Args:
        model: the blocks of a `ViT`, possibly inside the wrapper of torch.compile or AveragedModel.
        images: [N, C, H, W].
        num_steps: steps of the equal-mass grid; the number of blocks by default.
        sigmas: a grid to use instead.
        noise: the initial state: "none", or that of `initial_noise`.
        generator: source of the noise, on any device; by default the default generator of the
            images' device.
        guidance_scale: weight of the image against the null image; 1 is no guidance.
        sampler: "euler" or "heun"; see `sample_heun`.

    Returns:
        float32 [N, num_classes].

    Raises:
        TypeError: `model` is not a `DiffusionBlocks`.
        ValueError: both `num_steps` and `sigmas` are given, `num_steps` is not positive, or a
            `sampler` is given without steps.
    """
    model = unwrapped(model)
    if not isinstance(model, DiffusionBlocks):
        raise TypeError(
            f"model must be the DiffusionBlocks of a ViT, got {type(model).__name__}; "
            "a plain classifier is called as vit(images)"
        )
    config: Any = model.base_model.config  # pyright: ignore[reportAttributeAccessIssue]
    shape = (images.shape[0], config.width)
    z = torch.zeros(shape, device=images.device)
    device = draw_device(generator, images.device)
    if noise != "none":
        schedule = model.config.noise_schedule
        z = initial_noise(shape, schedule, noise=noise, generator=generator, device=device)
        z = z.to(images.device)
    if num_steps is None and sigmas is None and trained_at_top(model):
        if sampler != "euler":
            raise ValueError(
                "the product of the blocks' predictions takes no steps, so sampler must be 'euler',"
                f" the default, got {sampler!r}; give num_steps or sigmas, or leave it out"
            )
        return product_logits(model, z, images=images, guidance_scale=guidance_scale)
    grid = grid_of(model, num_steps, sigmas)
    return sample_logits(
        model, z, grid, sampler=sampler, images=images, guidance_scale=guidance_scale
    )
