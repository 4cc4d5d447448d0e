"""Refuses what converted models would ignore: adapters, hooks and heads of other kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dblocks.blocks.changes import RECORDS, replacement, runs_more
from dblocks.blocks.sharding import is_part

OTHER_HEADS = {
    "ForTokenClassification": "a class of each token",
    "ForMultipleChoice": "a choice between texts",
    "ForQuestionAnswering": "the place of an answer",
    "ForNextSentencePrediction": "whether one sentence follows another",
    "ForPreTraining": "two targets at once",
}


def check_layers_alone(layers: Mapping[str, nn.Module], uncounted: Sequence[str] = RECORDS) -> None:
    """Raises for layers with hooks or a replaced forward, since only their parts are called."""
    for name, layer in layers.items():
        if runs_more(layer, uncounted):
            raise ValueError(
                f"{name} must have no hooks and no replaced forward, since the "
                f"parts of a converted layer are called and not the layer, got some on this "
                f"{type(layer).__name__}; remove them, or put them on its attention or MLP"
            )


def check_above(model: nn.Module, names: Iterable[str]) -> None:
    """Raises for modules around the layers with hooks or a replaced forward.

    The layers of a block are called alone. Hooks on the model itself are of its own calls.
    """
    paths = {name.rpartition(".")[0] for name in names}
    while paths := paths - {""}:
        for path in sorted(paths):
            module = model.get_submodule(path)
            if runs_more(module):
                raise ValueError(
                    f"{path} must have no hooks and no replaced forward, since the "
                    f"layers of a block are called and not what holds them, got some on this "
                    f"{type(module).__name__}; remove them"
                )
        paths = {path.rpartition(".")[0] for path in paths}


def check_read(model: nn.Module, module: Any, kind: type[nn.Module], what: str) -> None:
    """Raises unless a module whose weights are read has the forward of its kind.

    Args:
        model: the model that holds the module.
        module: an embedding or output head.
        kind: the class whose forward it must have.
        what: its role in the model, for the message.
    """
    name = _name_of(model, module, what)
    own = type(module).__module__.startswith("transformers.")  # Such as an embedding times sqrt(D).
    if not isinstance(module, kind) or (type(module).forward is not kind.forward and not own):
        raise ValueError(
            f"{name} must be an nn.{kind.__name__}, since the {what} is also read as weights, got "
            f"a {type(module).__module__.partition('.')[0]} {type(module).__name__}; merge its "
            "adapter (merge_and_unload), or leave it out of target_modules, of modules_to_save and "
            "of what is quantised"
        )
    check_weights(model, module)
    # An embedding is called too, and hooks that require gradients are common there.
    if replacement(module) is not None or (kind is nn.Linear and runs_more(module)):
        raise ValueError(
            f"{name} must have no hooks and no replaced forward, since the {what} "
            "is also read as weights; remove them"
        )


def check_weights(model: nn.Module, module: Any) -> None:
    """Raises unless the weights of an embedding or output head, which are read, are plain."""
    if quantised(module.weight):
        raise ValueError(
            f"{_name_of(model, module, 'the output head')} must have plain weights, since they are "
            f"read beside being called, got a {type(module.weight).__name__} of "
            f"{module.weight.dtype}; quantise the layers alone"
        )


def quantised(weight: Any) -> bool:
    """Whether a parameter is packed in integers, or is a tensor that packs others."""
    packed = is_traceable_wrapper_subclass(weight) and not is_part(cast(Tensor, weight))
    return packed or (isinstance(weight, nn.Parameter) and not weight.is_floating_point())


def _name_of(model: nn.Module, module: Any, otherwise: str) -> str:
    return next((n for n, m in model.named_modules() if m is module), otherwise)


def check_no_virtual_tokens(model: Any) -> None:
    """Raises for prompt and prefix tuning of peft: virtual tokens are not in the layers."""
    configs = getattr(model, "peft_config", None)
    for adapter in configs.values() if isinstance(configs, Mapping) else ():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                "model must have no virtual tokens, which layers trained in blocks would not see, "
                f"got {type(adapter).__name__}; use an adapter in the layers such as LoRA"
            )


def check_target(model: Any) -> None:
    """Raises for a head of transformers whose target is not one class or token."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    for kind in type(own).__mro__:
        for ending, content in OTHER_HEADS.items():
            if kind.__name__.endswith(ending):
                raise ValueError(
                    "the head must tell one class of each sample, or each token, got "
                    f"{type(own).__name__}, whose target is {content}; write a network with the "
                    "members of dblocks.blocks.BlockModel instead"
                )


def check_classes(count: int, problem: str | None = None) -> None:
    """Raises unless exactly one of several classes is correct."""
    if count < 2 or problem not in (None, "single_label_classification"):
        raise ValueError(
            "the head must choose one of at least two classes, got "
            f"num_labels={count} with problem_type={problem!r}, as for a number (regression) or "
            "for several labels at once; load it with num_labels= and "
            "problem_type='single_label_classification'"
        )
