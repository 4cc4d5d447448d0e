"""The norms that the fused ops compute in place of other libraries' modules, in one table.

Torch's norms are recognised by their class, those of other libraries by the source of their
forward. Every other module runs its own forward, and so does a subclass of a known one, since it
may change anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dblocks.integrations.digest import digest
from dblocks.ops._dispatch import Norm

HALF = (torch.float16, torch.bfloat16)


class NormSpec(NamedTuple):
    """What the fused ops need to know of a norm, and the dtype in which its forward returns it."""

    norm: Norm
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype


def _layer_norm(norm: Any, dtype: torch.dtype) -> NormSpec | None:
    if len(norm.normalized_shape) != 1:
        return None
    return NormSpec("layer", norm.eps, norm.weight, norm.bias, dtype)


def _torch_rms_norm(norm: Any, dtype: torch.dtype) -> NormSpec | None:
    if len(norm.normalized_shape) != 1 or norm.eps is None:
        return None
    return NormSpec("rms", norm.eps, norm.weight, None, dtype)


def _llama_rms_norm(norm: Any, dtype: torch.dtype) -> NormSpec:
    """The result is a product with the weight, in the dtype that this promotes to."""
    weight = norm.weight
    dtype = torch.promote_types(dtype, weight.dtype)
    return NormSpec("rms", norm.variance_epsilon, weight, None, dtype)


def _diffusers_rms_norm(norm: Any, dtype: torch.dtype) -> NormSpec:
    """The result takes the dtype of a half-precision weight."""
    weight, bias = norm.weight, norm.bias
    if weight is None:
        return NormSpec("rms", norm.eps, None, None, dtype)
    if weight.dtype in HALF:
        dtype = weight.dtype
    else:
        dtype = torch.promote_types(torch.promote_types(dtype, torch.float32), weight.dtype)
    dtype = dtype if bias is None else torch.promote_types(dtype, bias.dtype)
    return NormSpec("rms", norm.eps, weight, bias, dtype)


Describe: TypeAlias = Callable[[Any, torch.dtype], NormSpec | None]

TORCH: dict[type, Describe] = {nn.LayerNorm: _layer_norm, nn.RMSNorm: _torch_rms_norm}

# Other libraries' by the digest of the forward, so that none is imported for it. Mistral, Qwen and
# others have Llama's code; a norm that scales by 1 + weight, such as Gemma's, has another.
FORWARDS: dict[str, Describe] = {
    "28284bd7a0f5": _llama_rms_norm,  # LlamaRMSNorm of transformers
    "2d899226e225": _layer_norm,  # LayerNorm of timm
    "68f52e162230": _layer_norm,  # FP32LayerNorm of diffusers
    "c552ef498523": _diffusers_rms_norm,  # RMSNorm of diffusers
    "dc6c5653e7fa": _diffusers_rms_norm,
}

_WARNED: set[type] = set()


def norm_spec(norm: nn.Module, dtype: torch.dtype) -> NormSpec | None:
    """A norm as the fused ops compute it; None where its own forward has to.

    Args:
        norm: any module.
        dtype: of the rows that it is given.
    """
    describe = _describe(type(norm))
    return None if describe is None else describe(norm, dtype)


def warn_of_subclasses(modules: Iterable[nn.Module], *, stacklevel: int) -> None:
    """Warns of subclasses of known norms, once a class: their own forward runs, unfused."""
    for cls in dict.fromkeys(map(type, modules)):
        if cls in _WARNED or _describe(cls) is not None:
            continue
        known = next((base for base in cls.__mro__[1:] if _describe(base) is not None), None)
        if known is not None:
            _WARNED.add(cls)
            warnings.warn(
                f"not fused: {cls.__qualname__}, a subclass of {known.__qualname__}, whose own "
                f"forward runs; where it computes the same, use {known.__qualname__} itself",
                stacklevel=stacklevel + 1,
            )


def _describe(cls: type) -> Describe | None:
    return TORCH[cls] if cls in TORCH else FORWARDS.get(_forward_of(cls))


# A source cannot be read while a compiled forward is traced, but it does not change either.
@torch.compiler.assume_constant_result
def _forward_of(cls: type) -> str:
    """The digest of the forward that the class itself defines; empty where there is none."""
    forward = vars(cls).get("forward")
    return "" if forward is None else digest(forward) or ""
