"""Which classes of diffusers `fuse_` knows, and by which sources of their forwards.

A forward of another source may compute another function, so its class is left alone. The digests
are those of diffusers 0.33 to 0.42; a new one stands here once its source was read.
"""

from __future__ import annotations

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
# By class, as far as the installed version has them.
BY_CLASS = {
    getattr(module, name): fusion
    for (module, name), fusion in FUSIONS.items()
    if hasattr(module, name)
}
