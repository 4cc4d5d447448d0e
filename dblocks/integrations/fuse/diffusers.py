"""Which classes of diffusers `fuse_` knows, and by which sources of their forwards.

A forward of another source may compute another function, so its class is left alone. The digests
are those of diffusers 0.33 to 0.42; a new one stands here once its source was read.
"""

from __future__ import annotations

import importlib
from copy import copy
from importlib.util import find_spec
from typing import Any

from diffusers.models import attention, normalization
from diffusers.models.transformers import transformer_flux, transformer_sd3

from dblocks.integrations.fuse import basic, blocks, norms
from dblocks.integrations.fuse.fusion import Fusion

_NORM, _SUM, _BOTH = "adaln", "gated_residual", "residual_adaln + gated_residual"

FUSIONS = {
    (normalization, "AdaLayerNorm"): Fusion(norms.AdaLayerNorm, _NORM, ("7bb9531dbc6e",)),
    (normalization, "AdaLayerNormZero"): Fusion(norms.AdaLayerNormZero, _NORM, ("e0378976c470",)),
    (normalization, "AdaLayerNormZeroSingle"): Fusion(
        norms.AdaLayerNormZeroSingle, _NORM, ("095917f84fc4",)
    ),
    (normalization, "AdaLayerNormContinuous"): Fusion(
        norms.AdaLayerNormContinuous, _NORM, ("d21d0c169e89",)
    ),
    (normalization, "SD35AdaLayerNormZeroX"): Fusion(
        norms.SD35AdaLayerNormZeroX, _NORM, ("ac3b715c2ce0",)
    ),
    (attention, "BasicTransformerBlock"): Fusion(
        basic.BasicTransformerBlock, _BOTH, ("fa2703019379",), fits=basic.is_adaptive
    ),
    (attention, "JointTransformerBlock"): Fusion(
        blocks.JointTransformerBlock, _BOTH, ("73f36003c841",)
    ),
    (transformer_sd3, "SD3SingleTransformerBlock"): Fusion(
        blocks.SD3SingleTransformerBlock, _BOTH, ("2b4e2c3847e1",)
    ),
    (transformer_flux, "FluxTransformerBlock"): Fusion(
        blocks.FluxTransformerBlock, _BOTH, ("91c013d0400b",)
    ),
    (transformer_flux, "FluxSingleTransformerBlock"): Fusion(
        blocks.FluxSingleTransformerBlock, _SUM, ("83a8afc0808a",)
    ),
}
# Other models' copies of Flux's blocks, word for word.
_COPIES = (
    ("bria_fibo", "BriaFiboTransformerBlock", "FluxTransformerBlock"),
    ("longcat_image", "LongCatImageTransformerBlock", "FluxTransformerBlock"),
    ("longcat_image", "LongCatImageSingleTransformerBlock", "FluxSingleTransformerBlock"),
    ("ovis_image", "OvisImageTransformerBlock", "FluxTransformerBlock"),
)
for _name, _copy, _original in _COPIES:
    _path = f"diffusers.models.transformers.transformer_{_name}"
    if find_spec(_path) is not None:
        FUSIONS[importlib.import_module(_path), _copy] = FUSIONS[transformer_flux, _original]
# By class, as far as the installed version has them.
BY_CLASS = {
    getattr(module, name): fusion
    for (module, name), fusion in FUSIONS.items()
    if hasattr(module, name)
}


def announce(made: type, unfused: type) -> None:
    """Enters a fused class in diffusers' registries of blocks, which look up the exact class.

    Caches and layer skip read there where a block has its states among arguments and results.
    """
    if find_spec("diffusers.hooks._helpers") is None:
        return
    registry: Any = importlib.import_module("diffusers.hooks._helpers").TransformerBlockRegistry
    try:
        metadata = registry.get(unfused)
    except ValueError:
        return  # not one of its blocks
    registry.register(made, copy(metadata))
