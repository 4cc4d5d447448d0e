"""Models of transformers: which can be converted, and as what."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

from dblocks.integrations.convert.causal_lm import ConvertedCausalLM
from dblocks.integrations.convert.classes import ConvertedClassifier
from dblocks.integrations.convert.conditioned import conditioned
from dblocks.integrations.convert.families import (
    BertClassFamily,
    BertMaskedFamily,
    GPT2Family,
    RobertaClassFamily,
    RobertaMaskedFamily,
    RotaryFamily,
    ViTFamily,
    context_from_start,
)
from dblocks.integrations.convert.masked_lm import ConvertedMaskedLM
from dblocks.integrations.convert.plain import (
    check_classes,
    check_no_virtual_tokens,
    check_read,
    check_target,
)
from dblocks.integrations.convert.row_attention import CAUSAL, DOUBLED, with_attention

CAUSAL_FAMILIES = {
    "llama": RotaryFamily(),
    "mistral": RotaryFamily(),
    "qwen2": RotaryFamily(),
    "qwen3": RotaryFamily(),
    "gpt2": GPT2Family(),
}
CLASS_FAMILIES = {
    "vit": ViTFamily(),
    "bert": BertClassFamily(),
    "roberta": RobertaClassFamily(),
}
MASKED_FAMILIES = {"bert": BertMaskedFamily(), "roberta": RobertaMaskedFamily()}


def causal_lm(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedCausalLM:
    """A causal language model of transformers, with the attention of its rows in its layers.

    Args:
        model: such as a `LlamaForCausalLM`.
        layers: its layers by name.
        **options: of `ConvertedCausalLM`.

    Raises:
        ValueError: it has no head, or is of a family that is not known here.
    """
    family = _family(model, CAUSAL_FAMILIES, "'tokens' with a NoiseSchedule")
    check_no_virtual_tokens(model)
    if family.head(model) is None:
        raise _no_head(model, "AutoModelForCausalLM")
    check_read(model, family.head(model), nn.Linear, "output head")
    check_read(model, family.embedding(model), nn.Embedding, "embedding of tokens")
    width = model.config.hidden_size
    name = CAUSAL if options["rows_kind"] == "single" else DOUBLED
    context = partial(context_from_start, family, model)
    parts = conditioned(layers, width, context, partial(with_attention, name=name))
    return ConvertedCausalLM(model, parts, family, **options)


def classifier(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedClassifier:
    """A classifier of transformers.

    Args:
        model: such as a `ViTForImageClassification`.
        layers: its layers by name.
        **options: of `ConvertedClassifier`.

    Raises:
        ValueError: it has no head, or is of a family that is not known here.
    """
    family = _family(model, CLASS_FAMILIES, "'classes'")
    check_no_virtual_tokens(model)
    check_target(model)
    if not isinstance(getattr(model, "classifier", None), nn.Module) or isinstance(
        model.classifier, nn.Identity
    ):
        raise _no_head(model, "AutoModelForImageClassification or ...ForSequenceClassification")
    check_classes(model.config.num_labels, model.config.problem_type)
    width = model.config.hidden_size
    return ConvertedClassifier(
        model,
        conditioned(layers, width),
        family,
        num_classes=model.config.num_labels,
        width=width,
        **options,
    )


def masked_lm(
    model: Any, layers: Mapping[str, nn.Module], *, mask_token_id: int | None
) -> ConvertedMaskedLM:
    """A masked language model of transformers.

    Args:
        model: such as a `BertForMaskedLM`.
        layers: its layers by name.
        mask_token_id: number of the mask, as the tokenizer has it.

    Raises:
        ValueError: it has no head, is of a family that is not known here, or the mask is none of
            its tokens.
    """
    family = _family(model, MASKED_FAMILIES, "'tokens' with a MaskSchedule")
    check_no_virtual_tokens(model)
    check_target(model)
    if model.get_output_embeddings() is None:
        raise _no_head(model, "AutoModelForMaskedLM")
    size = model.config.vocab_size
    if mask_token_id is None or not 0 <= mask_token_id < size:
        raise ValueError(
            f"mask_token_id must be a token in 0..{size - 1}, got {mask_token_id}; "
            "pass tokenizer.mask_token_id"
        )
    width = model.config.hidden_size
    parts = conditioned(layers, width)
    return ConvertedMaskedLM(model, parts, family, width=width, mask_token_id=mask_token_id)


Family = TypeVar("Family")


def _family(model: Any, families: Mapping[str, Family], task: str) -> Family:
    kind = model.config.model_type
    if kind not in families:
        raise ValueError(
            f"task {task} needs one of {sorted(families)}, got {kind!r} "
            f"({type(model).__name__}); write a network with the members of "
            "dblocks.blocks.BlockModel instead"
        )
    return families[kind]


def _no_head(model: Any, loader: str) -> ValueError:
    return ValueError(
        f"model must have a head for the task, got {type(model).__name__} without one; "
        f"load it as {loader}"
    )
