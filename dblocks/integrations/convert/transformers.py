"""Models of transformers that can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn

from dblocks.integrations.convert.biased_families import BloomFamily, FalconFamily, MptFamily
from dblocks.integrations.convert.causal_lm import ConvertedCausalLM
from dblocks.integrations.convert.classes import ConvertedClassifier
from dblocks.integrations.convert.conditioned import conditioned
from dblocks.integrations.convert.encoder_families import (
    CLIPFamily,
    DINOv2Family,
    DistilBertClassFamily,
    DistilBertMaskedFamily,
    ElectraClassFamily,
    ElectraMaskedFamily,
    ModernBertClassFamily,
    ModernBertMaskedFamily,
    SigLIPFamily,
)
from dblocks.integrations.convert.families import (
    BertClassFamily,
    BertMaskedFamily,
    GemmaFamily,
    GPT2Family,
    OPTFamily,
    RobertaClassFamily,
    RobertaMaskedFamily,
    RotaryFamily,
    ViTFamily,
)
from dblocks.integrations.convert.layers import ConditionedLayer
from dblocks.integrations.convert.masked_lm import ConvertedMaskedLM
from dblocks.integrations.convert.plain import (
    check_classes,
    check_no_virtual_tokens,
    check_read,
    check_target,
)
from dblocks.integrations.convert.relative_families import (
    BeitFamily,
    DebertaClassFamily,
    DebertaMaskedFamily,
)
from dblocks.integrations.convert.row_attention import CAUSAL, DOUBLED
from dblocks.integrations.convert.seq2seq import ConvertedSeq2Seq, T5Family, UMT5Family

GRANITE = RotaryFamily(embedding_factor="embedding_multiplier", logit_divisor="logits_scaling")
LLAMA_LIKE = (
    "apertus", "arcee", "bitnet", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5",
    "ernie4_5_moe", "exaone4", "flex_olmo", "gemma3_text", "glm", "glm4",
    "glm4_moe", "gpt_oss", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jais2", "llama",
    "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "stablelm",
    "youtu",
)  # fmt: skip
CAUSAL_FAMILIES: dict[str, RotaryFamily] = {
    **dict.fromkeys(LLAMA_LIKE, RotaryFamily()),
    **dict.fromkeys(("gemma", "gemma2", "vaultgemma"), GemmaFamily()),
    "cohere": RotaryFamily(logit_factor="logit_scale"),
    "cohere2": RotaryFamily(logit_factor="logit_scale"),
    "cohere2_moe": RotaryFamily(logit_factor="logit_scale"),
    "bloom": BloomFamily(),
    "codegen": RotaryFamily("ln_f", dropout="drop"),
    "falcon": FalconFamily(),
    "gpt2": GPT2Family(),
    "gpt_bigcode": GPT2Family(),
    "gpt_neox": RotaryFamily("final_layer_norm", dropout="emb_dropout"),
    "gptj": RotaryFamily("ln_f", dropout="drop"),
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "mpt": MptFamily(),
    "mt5": T5Family(scaled=False),
    "opt": OPTFamily(),
    "persimmon": RotaryFamily("final_layernorm"),
    "phi": RotaryFamily("final_layernorm", dropout="embed_dropout"),
    "phimoe": RotaryFamily(refused={"sliding_window": "a window in the masks of all layers"}),
    "starcoder2": RotaryFamily(dropout="embedding_dropout"),
    "t5": T5Family(),
    "umt5": UMT5Family(),
}
CLASS_FAMILIES: dict[str, ViTFamily] = {
    "beit": BeitFamily(),
    "bert": BertClassFamily(),
    "camembert": RobertaClassFamily(),
    "clip": CLIPFamily(),
    "data2vec-text": RobertaClassFamily(),
    "deberta": DebertaClassFamily(),
    "deberta-v2": DebertaClassFamily(),
    "deit": ViTFamily(),
    "dinov2": DINOv2Family(),
    "dinov2_with_registers": DINOv2Family(),
    "distilbert": DistilBertClassFamily(),
    "electra": ElectraClassFamily(),
    "ernie": BertClassFamily(),
    "modernbert": ModernBertClassFamily(),
    "roberta": RobertaClassFamily(),
    "siglip": SigLIPFamily(),
    "vit": ViTFamily(),
    "vit_msn": ViTFamily(),
    "xlm-roberta": RobertaClassFamily(),
}
MASKED_FAMILIES: dict[str, BertMaskedFamily] = {
    "bert": BertMaskedFamily(),
    "camembert": RobertaMaskedFamily(),
    "data2vec-text": RobertaMaskedFamily(),
    "deberta": DebertaMaskedFamily(),
    "deberta-v2": DebertaMaskedFamily(),
    "distilbert": DistilBertMaskedFamily(),
    "electra": ElectraMaskedFamily(),
    "ernie": BertMaskedFamily(),
    "modernbert": ModernBertMaskedFamily(),
    "roberta": RobertaMaskedFamily(),
    "xlm-roberta": RobertaMaskedFamily(),
}
NEXT = "'tokens' with a NoiseSchedule"
CLASSES = "'classes'"
MASKED = "'tokens' with a MaskSchedule"
TASKS = {NEXT: CAUSAL_FAMILIES, CLASSES: CLASS_FAMILIES, MASKED: MASKED_FAMILIES}
# What transformers 4 computes otherwise: most make masks or rotations inside their layers.
NEEDS_5 = (
    "clip", "codegen", "distilbert", "gemma3_text", "gptj", "granitemoe", "modernbert", "olmo3",
    "phimoe", "qwen2_moe",
)  # fmt: skip
# Unsupported families, and why.
REFUSED = {
    "data2vec-vision": "its attention makes its own bias of the scores from the size of the images",
    "dinov3_vit": "transformers has no DINOv3 with a classifier; timm has (vit_*_dinov3)",
}


def causal_lm(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedCausalLM:
    """Converts a causal language model of transformers.

    Args:
        model: such as a `LlamaForCausalLM`.
        layers: its layers by name.
        **options: further arguments of `ConvertedCausalLM`.

    Raises:
        ValueError: the model has no head, or its family is not supported.
    """
    family = _family(model, CAUSAL_FAMILIES, NEXT)
    check_no_virtual_tokens(model)
    if family.head(model) is None:
        raise _no_head(model, "AutoModelForCausalLM")
    _check_options(model, family)
    check_read(model, family.head(model), nn.Linear, "output head")
    check_read(model, family.embedding(model), nn.Embedding, "embedding of tokens")
    width = model.config.hidden_size
    name = CAUSAL if options["rows_kind"] == "single" else DOUBLED
    parts = conditioned(
        layers,
        width,
        partial(family.layer_context, model),
        partial(family.attention, name=name),
        family.probed,
        partial(family.probe_context, model),
    )
    kind = ConvertedSeq2Seq if isinstance(family, T5Family) else ConvertedCausalLM
    return kind(model, parts, family, **options)


def classifier(model: Any, layers: Mapping[str, nn.Module], **options: Any) -> ConvertedClassifier:
    """Converts a classifier of transformers.

    Args:
        model: such as a `ViTForImageClassification`.
        layers: its layers by name.
        **options: further arguments of `ConvertedClassifier`.

    Raises:
        ValueError: the model has no head, or its family is not supported.
    """
    family = _family(model, CLASS_FAMILIES, CLASSES)
    check_no_virtual_tokens(model)
    check_target(model)
    if not isinstance(getattr(model, "classifier", None), nn.Module) or isinstance(
        model.classifier, nn.Identity
    ):
        raise _no_head(model, "AutoModelForImageClassification or ...ForSequenceClassification")
    check_classes(model.config.num_labels, model.config.problem_type)
    _check_options(model, family)
    width, inputs = family.width(model), getattr(model.classifier, "in_features", None)
    if options["head_kind"] == "learned" and inputs not in (None, width):
        raise ValueError(
            f"head='learned' needs a classifier of rows of width {width}, as the embedding of the "
            f"class is, got one of {inputs} in {type(model).__name__}; set head='posterior'"
        )
    return ConvertedClassifier(
        model,
        _conditioned(layers, width, family, model),
        family,
        num_classes=model.config.num_labels,
        width=width,
        **options,
    )


def masked_lm(
    model: Any, layers: Mapping[str, nn.Module], *, mask_token_id: int | None
) -> ConvertedMaskedLM:
    """Converts a masked language model of transformers.

    Args:
        model: such as a `BertForMaskedLM`.
        layers: its layers by name.
        mask_token_id: index of the mask token, as in the tokenizer.

    Raises:
        ValueError: the model has no head, its family is not supported, or the mask is not one of
            its tokens.
    """
    family = _family(model, MASKED_FAMILIES, MASKED)
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
    _check_options(model, family)
    parts = _conditioned(layers, width, family, model)
    return ConvertedMaskedLM(model, parts, family, width=width, mask_token_id=mask_token_id)


def default_list(model: Any) -> str | None:
    """The path of the list of layers to divide, for models with several lists."""
    family = CAUSAL_FAMILIES.get(model.config.model_type)
    return "decoder.block" if isinstance(family, T5Family) else None


Family = TypeVar("Family")


def _family(model: Any, families: Mapping[str, Family], task: str) -> Family:
    kind = model.config.model_type
    if kind not in families:
        why = f": {REFUSED[kind]}" if kind in REFUSED else ""
        fitting = " or ".join(name for name, known in TASKS.items() if kind in known)
        raise ValueError(
            f"task {task} needs one of {sorted(families)}, got {kind!r} "
            f"({type(model).__name__}){why}; {f'use task {fitting}, or ' if fitting else ''}"
            "write a network with the members of dblocks.blocks.BlockModel instead"
        )
    import transformers

    if kind in NEEDS_5 and transformers.__version__.startswith("4."):
        raise ValueError(
            f"{kind!r} must be of transformers 5, whose parts are known here, got transformers "
            f"{transformers.__version__}; install a newer one"
        )
    return families[kind]


def _check_options(model: Any, family: RotaryFamily | ViTFamily | BertMaskedFamily) -> None:
    reason = family.unsupported(model)
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} must have no options that its rows are not computed with, "
            f"got {reason}; change the config, or write a network with the members of "
            "dblocks.blocks.BlockModel instead"
        )


def _conditioned(
    layers: Mapping[str, nn.Module], width: int, family: ViTFamily | BertMaskedFamily, model: Any
) -> dict[str, ConditionedLayer]:
    """Conditioned layers with the model's own attention."""
    rows_context = partial(family.context, model, batch={})
    own = partial(family.layer_context, model)
    return conditioned(layers, width, own, rows_context=rows_context)


def _no_head(model: Any, loader: str) -> ValueError:
    return ValueError(
        f"model must have a head for the task, got {type(model).__name__} without one; "
        f"load it as {loader}"
    )
