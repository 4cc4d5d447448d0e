"""A diffusion transformer that generates images of a class, trained in blocks.

The target is the image itself, or a latent of it. End to end the network is one block of all
layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, DiffusionBlocks, unwrapped
from dblocks.blocks.targets.classes import check_labels
from dblocks.models.images import ImageModelConfig, ImageTarget
from dblocks.models.patches import sincos_positions, unpatchify
from dblocks.nn import (
    AdaLayerNorm,
    NoiseEmbedding,
    TransformerLayer,
    conditioning_of,
)
from dblocks.nn.conditioning import EMBEDDING_STD
from dblocks.sampling import initial_noise
from dblocks.sampling.levels import grid_of
from dblocks.sampling.samplers import sampler_of
from dblocks.sampling.steps import Callback, Sampler
from dblocks.schedules import NoiseLevel
from dblocks.schedules.random import draw_device

NUM_STEPS = 50  # and guidance scale; Shing et al. 2026
GUIDANCE_SCALE = 2.0

DiTConditioning = Literal["dit", "official"]


@dataclass(frozen=True)
class DiTConfig(ImageModelConfig):
    """Sizes of a `DiT`; the defaults are those of DiT-S/2 for the latents of 256-pixel images.

    Positions are whole numbers at `image_size`; other sizes are stretched over it.
    """

    channels: int = 4
    """Channels of the image or latent."""
    patch_size: int = 2
    """Side of a patch; divides height and width."""
    width: int = 384
    """Width D of the tokens, a multiple of 4."""
    heads: int = 6
    """Attention heads; a divisor of the width."""
    num_classes: int = 1000
    """Number of classes; 0 for images without classes."""
    label_drop: float = 0.1
    """Probability of dropping the label in training, for guidance."""
    conditioning: DiTConditioning = "dit"
    """Convention of conditioning on noise and class: dit or official."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditioning not in get_args(DiTConditioning):
            raise ValueError(
                f"conditioning must be one of {get_args(DiTConditioning)}, "
                f"got {self.conditioning!r}; a denoiser must know the noise"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {self.num_classes}")
        if self.width % 4:
            raise ValueError(
                f"width must be a multiple of 4, as positions are sines and cosines of two "
                f"coordinates, got {self.width}"
            )
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")

    @property
    def drops_labels(self) -> bool:
        """Whether there is a null label, so that guidance is possible."""
        return self.num_classes > 0 and self.label_drop > 0


class Hidden(NamedTuple):
    """The result of the layers."""

    x: Tensor
    """Tokens [N, P, D], row by row of the image."""
    cond: Tensor
    """Conditioning vector [N, cond_dim]."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


class DiT(nn.Module):
    """A diffusion transformer; `DiffusionBlocks(DiT(config), ...)` trains it in one or more blocks.

        c = noise_embedding(c_noise) + label_embedding(label)
        x = patches(c_in*z) + positions ;  x = layer(x, c) for the layers of a block
        F = unpatchify(Linear(LN(x)*(1 + scale) + shift)),  shift, scale = chunks of Linear(SiLU(c))

    The loss is `edm_loss` of F, the denoised estimate `c_skip*z + c_out*F`. Positions are fixed
    sines and cosines; patches of an image of another size than `config.image_size` have the
    coordinates of their centres after stretching the image to the native size.

    Initialisation: linear layers Xavier uniform, the embeddings of noise and label normal with std
    .02, modulations and the last linear layer zero.

    The layout of patches and tokens is that of the published DiT. Its tensors (left) correspond to
    these, with conditioning "dit" and without the second half of channels for variances:

        x_embedder.proj              patches
        t_embedder.mlp.0, .2         noise_embedding.fc1, .fc2
        y_embedder.embedding_table   label_embedding
        blocks.I.attn.qkv, .proj     layers.I.attention.qkv, .out
        blocks.I.mlp.fc1, .fc2       layers.I.mlp.fc1, .fc2
        blocks.I.adaLN_modulation.1  layers.I.modulation.linear
        final_layer.adaLN_modulation.1, final_layer.linear    norm.modulation.linear, output_head
        pos_embed                    none: computed

    Args:
        config: the sizes.

    Source: Peebles and Xie 2023 (DiT); Karras et al. 2022 (EDM) for noise levels and loss.
    """

    positions: Tensor
    reads = ()  # in addition to its target's

    @property
    def call_reads(self) -> tuple[str, ...]:
        """See `BlockModel`."""
        return ("labels",) if self.config.num_classes else ()

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        D, kind, patch = config.width, config.conditioning, config.patch_size
        cond_dim = conditioning_of(kind).width(D)
        self.patches = nn.Conv2d(config.channels, D, patch, stride=patch)
        self.noise_embedding = NoiseEmbedding(cond_dim)
        self.label_embedding = (
            nn.Embedding(config.num_classes + config.drops_labels, cond_dim)
            if config.num_classes
            else None
        )
        hidden_dim = int(D * config.mlp_ratio)
        self.layers = nn.ModuleList(
            TransformerLayer(
                D,
                config.heads,
                hidden_dim,
                conditioning=kind,
                gate_init=config.gate_init,
                mlp="gelu_tanh",
            )
            for _ in range(config.depth)
        )
        self.norm = AdaLayerNorm(D, kind)
        self.output_head = nn.Linear(D, patch * patch * config.channels)
        grid = self._grid(*config.height_width)
        self.register_buffer("positions", sincos_positions(grid, D, native=grid), persistent=False)
        self.target = ImageTarget(config.channels, patch, config.num_classes)
        self.condition_drop = config.label_drop if config.drops_labels else 0.0
        self._init_weights()

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Tensor | None:
        """Embeddings of `batch["labels"]` [N], [N, cond_dim]; None for images without classes.

        Samples with `drop` [N] get the null label's, the last row of the table.
        """
        config = self.config
        if drop is not None and not config.drops_labels:
            raise ValueError(
                "guidance needs a model trained without some labels, got "
                f"num_classes={config.num_classes} and label_drop={config.label_drop}; "
                "set both above 0, or guidance_scale to 1"
            )
        if self.label_embedding is None:
            return None
        labels = self.target.labels(batch)
        if drop is not None:
            labels = labels.masked_fill(drop, config.num_classes)
        return self.label_embedding(labels)

    def run_layers(
        self,
        layers: Iterable[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        condition: Tensor | None,
    ) -> Hidden:
        """Runs `layers` on the patches of the noisy image [N, C, H, W]."""
        cond = self.noise_embedding(level.c_noise)
        if condition is not None:
            cond = cond + condition
        grid = self._grid(*z_in.shape[2:])
        tokens = self.patches(z_in.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        x = tokens + self._positions(grid).to(tokens.dtype)
        for layer in layers:
            x = layer(x, cond)
        return Hidden(x, cond, grid)

    def features(self, hidden: Hidden) -> Tensor:
        """F [N, C, H, W], float32 also under autocast (float64)."""
        x = hidden.x
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.output_head.weight.dtype))
            tokens = self.output_head(self.norm(x, hidden.cond.to(x.dtype)))
        return unpatchify(tokens, hidden.grid, self.config.patch_size)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.config.patch_size, width // self.config.patch_size

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        native = self._grid(*self.config.height_width)
        if grid == native:
            return self.positions
        return sincos_positions(
            grid, self.config.width, native=native, device=self.positions.device
        )

    def _init_weights(self) -> None:
        nn.init.xavier_uniform_(self.patches.weight.view(self.patches.weight.shape[0], -1))
        for tensor in (self.patches.bias, self.output_head.weight, self.output_head.bias):
            nn.init.zeros_(cast(Tensor, tensor))
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight, std=EMBEDDING_STD)


def generate_images(
    model: DiffusionBlocks,
    labels: Tensor | int,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_steps: int | None = None,
    spacing: Literal["equal_mass", "karras"] = "equal_mass",
    sigmas: Tensor | Sequence[float] | None = None,
    guidance_scale: float | None = None,
    noise: Literal["paper", "unit_variance"] = "paper",
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    sampler: Sampler = "euler",
) -> Tensor:
    """Samples images from a `DiT` in blocks, by Euler steps from noise; a step runs one block only.

    `dblocks.sampling.sampling_cost` counts how often each block runs.

    Args:
        model: the blocks of a `DiT`, possibly inside the wrapper of torch.compile or AveragedModel.
        labels: the classes, int64 [N]; for a model without classes the number of images N.
        image_size: height and width, one number for a square; the model's own by default.
        num_steps: Euler steps; 50 by default.
        spacing: the rule of their noise levels, see `NoiseSchedule.steps`.
        sigmas: noise levels to use instead.
        guidance_scale: g of `uncond + g*(cond - uncond)`: 1 is the conditional and 0 the
            unconditional model, each with one call per step; other values need two. 2 by default,
            but 1 for a model trained without dropping labels.
        noise: the initial state, see `initial_noise`.
        generator: source of the initial state, on any device; by default the default generator of
            the model's device.
        callback: called after each step, see `sample_euler`.
        sampler: "euler", or "heun", of second order with two calls per step; see `sample_heun`.

    Returns:
        float32 [N, C, H, W], in the range of the training images, but not clamped.

    Raises:
        TypeError: `model` is not the `DiffusionBlocks` of a `DiT`, or labels have a wrong type.
        ValueError: both `num_steps` and `sigmas` are given, or an argument has an invalid value.
    """
    model = unwrapped(model)
    network = getattr(model, "base_model", model)
    if not isinstance(model, DiffusionBlocks) or not isinstance(network, DiT):
        raise TypeError(
            f"model must be the DiffusionBlocks of a DiT, got {type(model).__name__}"
            f"{'' if network is model else f' of {type(network).__name__}'}; end to end, that is "
            "one block"
        )
    config = network.config
    cond = _condition(config, labels)
    count = labels if isinstance(labels, int) else len(labels)
    height, width = config.height_width if image_size is None else _pair(image_size)
    network.target.check_shape((count, config.channels, height, width))
    if sigmas is None:
        steps = NUM_STEPS if num_steps is None else num_steps
        sigmas, num_steps = model.config.noise_schedule.steps(steps, spacing), None
    grid = grid_of(model, num_steps, sigmas)
    if guidance_scale is None:
        guidance_scale = GUIDANCE_SCALE if config.drops_labels else 1.0
    device = network.output_head.weight.device
    cond = {name: value.to(device) for name, value in cond.items()}
    z = initial_noise(
        (count, config.channels, height, width),
        model.config.noise_schedule,
        noise=noise,
        generator=generator,
        device=draw_device(generator, device),
    )
    return sampler_of(sampler)(
        model, z.to(device), grid, callback=callback, guidance_scale=guidance_scale, **cond
    )


def _condition(config: DiTConfig, labels: Tensor | int) -> dict[str, Any]:
    if not config.num_classes:
        if isinstance(labels, bool) or not isinstance(labels, int) or labels < 0:
            raise TypeError(
                f"labels must be the number of images for a model without classes, got {labels!r}"
            )
        return {}
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be an int64 tensor [N] of the {config.num_classes} classes, "
            f"got {type(labels).__name__}"
        )
    check_labels(labels)
    return {"labels": labels}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
