"""`convert` wraps a model of another library as a network in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.blocks.config import check_config
from dblocks.blocks.targets.classes import Head
from dblocks.integrations.convert.blocks import ConvertedBlocks
from dblocks.integrations.convert.causal_lm import Rows
from dblocks.integrations.convert.network import Converted
from dblocks.integrations.convert.options import ConvertOptions
from dblocks.integrations.convert.tasks import Task, network_of
from dblocks.integrations.convert.whole import check_whole


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
    check: bool = True,
) -> ConvertedBlocks:
    """Wraps an existing model for training in blocks.

    The wrapper adds a noise embedding, a modulation of each layer (a DiT has its own), an input for
    the noisy target and, with a learned head, a modulation of the head. These have float32
    parameters and are initialised so that the layers do not change. The model's own modules and
    weights are used, not copied: training the blocks trains the model.

    The model is verified on small inputs, by one call of it and a few of its layers' parts, without
    gradients; and again at the next use after it was changed. Hooks run in these calls, since what
    they compute counts: one that counts or records calls sees these too, so add it afterwards.

    - "classes": the target is the embedding of the class. ViT, BERT and others of transformers,
      with a classification head, and timm's ViTs. A batch holds "labels", and "images" or "tokens".
    - "tokens": with a `NoiseSchedule`, the embedding of each token, from those before it: Llama,
      Mistral, GPT-2 and others with a head, or the decoder of a T5 or UMT5, of which a batch also
      holds "encoder_tokens". With a `MaskSchedule`, masked tokens: BERT, RoBERTa and others with
      their head. A batch holds "tokens".
    - "images": the image, latent or video itself: diffusers' DiT, with a batch of "images" and
      "labels", and other denoisers (Flux, SD3, Wan and more), with a batch of "images" and further
      arguments of the model's forward by name.

    Args:
        model: the model.
        config: the number of blocks and the options of their training.
        task: the target, see above.
        layers: the residual layers: the path of the list that holds them, the paths of several such
            lists in order, their own paths, or a function that returns them, given the model. By
            default they are found.
        clean_loss_weight: weight of the model's own loss on the same batch, such as the next
            token's cross-entropy, which a pretrained model otherwise forgets. It runs the whole
            model, but only the block's layers get gradients from it.
        embed_scale: norm of the target embedding of a class or token.
        tokens_per_sigma: number of consecutive tokens that share a noise level; None: all of a
            sequence.
        mask_token_id: the index of the mask token, for masked tokens.
        rows: how noisy embeddings of tokens enter, with a `NoiseSchedule`: "single", added to the
            rows of the tokens before, one row per token; or "doubled", as published, in separate
            rows next to clean ones.
        head: form of the logits of classes, or of tokens with a `NoiseSchedule`: "posterior", the
            model's own logits plus the exact log-likelihood of the noisy embedding; or "learned",
            as published, the head applied to the EDM-preconditioned row.
        check: whether to run the whole model once on a small batch and compare it with its parts
            (for a model on the meta device, at the first loss or prediction). False for a model
            with offloaded weights.

    Raises:
        ValueError: the layers are not found or are not transformer layers, the head is missing, or
            the model's family, the task and the schedule do not match; the model computes something
            outside its layers, embedding and head that would be lost, such as an adapter on the
            head, virtual tokens, or hooks on layers; or blocks share a parameter.
        TypeError: `model` is not a module, or `config` is not a `BlocksConfig`.

    Warns:
        UserWarning: a norm of the layers is a subclass of a known one, so that it is not fused.

    Source: Shing, Koyama and Akiba 2026, arXiv 2506.14202.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, (DiffusionBlocks, Converted)):
        raise ValueError(
            f"model must be one that was not converted, got a {type(model).__name__}; convert "
            "base_model.model of it"
        )
    check_config(config)
    options = ConvertOptions(
        clean_loss_weight=clean_loss_weight,
        embed_scale=embed_scale,
        tokens_per_sigma=tokens_per_sigma,
        mask_token_id=mask_token_id,
        rows=rows,
        head=head,
    )
    network = network_of(model, config, task, layers, options)
    network.compared = check
    network.whole_checked = not check or check_whole(network)
    return ConvertedBlocks(network, config, task, options)
