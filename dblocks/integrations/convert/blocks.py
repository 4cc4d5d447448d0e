"""Cutting somebody's model into blocks: `convert` wraps it, as `get_peft_model` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, Block, BlockModel, BlocksConfig, DiffusionBlocks, Draw, Loss
from dblocks.blocks.targets.classes import Head, check_head
from dblocks.checkpoint import naming
from dblocks.config import check_block, check_count
from dblocks.integrations.convert import files
from dblocks.integrations.convert.causal_lm import Rows
from dblocks.integrations.convert.find import find_layers
from dblocks.integrations.convert.network import Converted
from dblocks.ops._autograd import apply, first_order

Task = Literal["classes", "tokens", "images"]
LIBRARIES = ("transformers", "timm", "diffusers")


class ConvertedBlocks(DiffusionBlocks):
    """A converted model in blocks: a `DiffusionBlocks` whose network is the user's, with additions.

    `base_model` is called as the user's model is and has its attributes; `base_model.model` is it.

    Args:
        model: the user's model with the parts of a `BlockModel`.
        config: how it is cut.
        task: what the target is.
        options: the other arguments of `convert`, which a checkpoint keeps.
    """

    base_model: Converted  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, model: Converted, config: BlocksConfig, task: Task, options: dict[str, Any]
    ) -> None:
        super().__init__(cast(Any, model), config)
        self.task: Task = task
        self.options = options
        self.clean_loss_weight: float = options["clean_loss_weight"]

    def loss_at(self, batch: Batch, block: int, draw: Draw) -> Loss:
        """As `DiffusionBlocks.loss_at`, plus `clean_loss_weight` times `clean_loss`."""
        if self.clean_loss_weight == 0:
            return super().loss_at(batch, block, draw)
        clean = self.clean_loss_weight * self.clean_loss(batch, block, draw)
        result = super().loss_at(batch, block, draw)
        return result._replace(loss=result.loss + clean)

    def clean_loss(self, batch: Batch, block: int, draw: Draw) -> Tensor:
        """The model's own loss, whose gradients go to the layers of one block and no further.

        The layers before the block run without a graph; those after it, and the head, pass
        gradients on and get none. Where tokens are masked, it is of those that `draw` masks.

        Its gradients are computed here, since layers that a checkpoint computes again must find the
        others without gradients still; so this graph is gone when that of denoising is made.
        """
        schedule, z = self.config.schedule, None
        if schedule.corruption == "masks":
            y = self.base_model.target.embed(self.base_model.target.check(batch))
            z = schedule.corrupt(y, schedule.level(draw.sigma), draw.seed).z
        first, last = self.layer_ranges[block]
        model = self.base_model.model
        layers = [model.get_submodule(name) for name in self.base_model.names[first:last]]
        trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        with _only_gradients_of(model, trained):
            loss = self.base_model.plain_loss(batch, z)
            if not loss.requires_grad:
                return loss
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return _with_gradients(loss.detach(), trained, gradients)

    def parts(self, block: int) -> tuple[BlockModel, list[nn.Module]]:
        """As `DiffusionBlocks.parts`; private copies checkpoint as the model does."""
        model, layers = super().parts(block)
        if model is not self.base_model:
            cast(Converted, model).switch_as_(self.base_model)
        return model, layers

    def block(self, block: int) -> Block:
        """The view of one block.

        Raises:
            ValueError: there is a clean loss, which needs the whole model.
        """
        if self.clean_loss_weight:
            raise ValueError(
                "a block alone must not have a clean loss, which runs the whole model, got "
                f"clean_loss_weight={self.clean_loss_weight}; train with train_step(dm, ...), "
                "or convert without it"
            )
        return super().block(block)

    def save_pretrained(self, folder: str | Path, block: int | None = None) -> None:
        """Writes a file for each block, one for what they share, and dblocks.json.

        Args:
            folder: made if it is not there.
            block: writes this block's file alone, beside dblocks.json: each worker its own.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: the folder cannot be written to.
        """
        if block is not None:
            check_block(block, self.config.num_blocks)
        files.save(self, folder, block)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module) -> ConvertedBlocks:
        """What `save_pretrained` wrote, around a model of the same architecture.

        Args:
            folder: with the files of all blocks.
            model: whose weights are replaced.

        Raises:
            ImportError: safetensors is not installed.
            ValueError: a file is missing or broken, or the model does not fit.
        """
        given = files.read_config(folder)
        if type(model).__name__ != given["model"]:
            raise ValueError(
                f"model must be a {given['model']}, as in {folder}, got a {type(model).__name__}"
            )
        with naming(Path(folder) / files.CONFIG_FILE):
            converted = convert(
                model,
                BlocksConfig.from_dict(given["blocks_config"]),
                task=given["task"],
                layers=given["layers"],
                **given["options"],
            )
        files.load(converted, folder, given["ties"])
        return converted


def convert(
    model: nn.Module,
    config: BlocksConfig,
    *,
    task: Task,
    layers: str | Sequence[str] | Callable[[nn.Module], Sequence[nn.Module]] | None = None,
    clean_loss_weight: float = 0.0,
    embed_scale: float = 1.0,
    tokens_per_sigma: int | None = 1,
    mask_token_id: int | None = None,
    rows: Rows = "single",
    head: Head = "posterior",
) -> ConvertedBlocks:
    """An existing model, to be trained in blocks; a new object around it, which leaves it as it is.

    What is added, at first without an effect on the layers: a noise embedding, a modulation of each
    layer (a DiT has its own), a noisy target's way in, and, where the head is learned, the
    readout's dependence on the noise. It has float32 parameters. The model's own modules and
    weights are used, not copied: training the blocks trains the model.

    - "classes": the target is the embedding of the class. ViT and BERT of transformers, with a
      classification head, and timm's ViTs. A batch holds "labels", and "images" or "tokens".
    - "tokens": with a `NoiseSchedule`, the embedding of each token, from those before it: Llama,
      Mistral, Qwen2, Qwen3 and GPT-2 with a head. With a `MaskSchedule`, masked tokens: BERT and
      RoBERTa with their head. A batch holds "tokens".
    - "images": the image or latent itself: diffusers' DiT. A batch holds "images" and "labels".

    Args:
        model: the model.
        config: how it is cut.
        task: what the target is.
        layers: the residual layers: the path of the list that holds them, their own paths, or a
            function of the model that returns them; found by default.
        clean_loss_weight: weight of the model's own loss on the same batch, such as the next
            token's cross-entropy. Denoising alone makes a pretrained model forget it. It runs the
            whole model, though only the block's layers get gradients from it.
        embed_scale: norm of a class' or token's embedding.
        tokens_per_sigma: how many consecutive tokens share a noise level; None: all of a sequence.
        mask_token_id: the mask's number, for masked tokens.
        rows: how noisy embeddings of tokens enter, with a `NoiseSchedule`: "single", in the rows of
            the tokens before them, one row a token; or "doubled", as published, in rows of their
            own beside clean ones.
        head: what logits of classes, or of tokens with a `NoiseSchedule`, are: "posterior", what
            the model says of its input plus the exact log-likelihood of the noisy embedding; or
            "learned", as published, a readout of the EDM-preconditioned row.

    Raises:
        ValueError: the layers are not found or are no transformer layers, the head is missing, or
            the model's family, the task and the schedule do not fit.
        TypeError: `model` is no module, or `config` is no `BlocksConfig`.

    Source: Shing, Koyama and Akiba 2026, arXiv 2506.14202.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, (DiffusionBlocks, Converted)):
        raise ValueError(
            f"model must be one that was not converted, got a {type(model).__name__}; convert "
            "base_model.model of it"
        )
    if not isinstance(config, BlocksConfig):
        raise TypeError(f"config must be a BlocksConfig, got {type(config).__name__}")
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {get_args(Task)}, got {task!r}")
    _check_options(task, clean_loss_weight, embed_scale, tokens_per_sigma)
    check_head(head)
    if rows not in get_args(Rows):
        raise ValueError(f"rows must be one of {get_args(Rows)}, got {rows!r}")
    library = library_of(model)
    found = find_layers(model, layers)
    of_noise = config.schedule.corruption == "noise"
    sigma_data = config.noise_schedule.sigma_data if of_noise else 1.0
    if library == "transformers":
        from dblocks.integrations.convert import transformers as adapter

        if task == "classes":
            converted = adapter.classifier(
                model, found, sigma_data=sigma_data, embed_scale=embed_scale, head_kind=head
            )
        elif task == "tokens" and of_noise:
            converted = adapter.causal_lm(
                model,
                found,
                sigma_data=sigma_data,
                embed_scale=embed_scale,
                tokens_per_sigma=tokens_per_sigma,
                rows_kind=rows,
                head_kind=head,
            )
        elif task == "tokens":
            converted = adapter.masked_lm(model, found, mask_token_id=mask_token_id)
        else:
            raise _no_such_task(model, task)
    elif library == "timm" and task == "classes":
        from dblocks.integrations.convert import timm

        converted = timm.classifier(
            model, found, sigma_data=sigma_data, embed_scale=embed_scale, head_kind=head
        )
    elif library == "diffusers" and task == "images":
        from dblocks.integrations.convert import diffusers

        converted = diffusers.image_model(model, found, config.noise_schedule)
    else:
        raise _no_such_task(model, task)
    options = {
        "clean_loss_weight": clean_loss_weight,
        "embed_scale": embed_scale,
        "tokens_per_sigma": tokens_per_sigma,
        "mask_token_id": mask_token_id,
        "rows": rows,
        "head": head,
    }
    return ConvertedBlocks(converted, config, task, options)


def library_of(model: nn.Module) -> str | None:
    """The library that a model, or a class it derives from, is of; None for others.

    Of a model inside peft's wrapper, that of the model.
    """
    own = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    roots = [kind.__module__.partition(".")[0] for kind in type(own).__mro__]
    return next((root for root in roots if root in LIBRARIES), None)


def _no_such_task(model: nn.Module, task: str) -> ValueError:
    return ValueError(
        f"task {task!r} must be one that a {type(model).__name__} has; see dblocks.convert for "
        "those that are known, or write a network with the members of dblocks.blocks.BlockModel"
    )


def _check_options(
    task: str, clean_loss_weight: float, embed_scale: float, tokens_per_sigma: int | None
) -> None:
    for name, value in (("clean_loss_weight", clean_loss_weight), ("embed_scale", embed_scale)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= clean_loss_weight < math.inf or (clean_loss_weight and task == "images"):
        raise ValueError(
            "clean_loss_weight must not be negative or infinite, and 0 for images, whose only loss "
            f"is that of denoising, got {clean_loss_weight}"
        )
    if not 0 < embed_scale < math.inf:
        raise ValueError(f"embed_scale must be positive and finite, got {embed_scale}")
    if tokens_per_sigma is not None:
        check_count("tokens_per_sigma", tokens_per_sigma)


@contextmanager
def _only_gradients_of(model: nn.Module, trained: Sequence[Tensor]) -> Iterator[None]:
    """What runs inside makes no graph for any parameter but these."""
    kept = {id(p) for p in trained}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _with_gradients(
    value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """`value` 0-d, as a function of parameters that has these gradients."""
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    return apply(_Known, value, *(p for p, _ in pairs), *(g for _, g in pairs))


class _Known(torch.autograd.Function):
    """A number whose gradients are known: value, parameters, their gradients -> value."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return value.clone()

    @staticmethod
    @first_order("the clean loss of ConvertedBlocks", "set clean_loss_weight=0")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(grad.to(g.dtype) * g for g in gradients), *(None for _ in gradients))
