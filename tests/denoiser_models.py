"""A small model of every family of diffusers' denoisers that can be converted, and its batch."""

import pytest
import torch
from hub_tools import library

from tools import seeded

N, TEXT, D = 2, 5, 12
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
PATCHES = {"patch_size": 2, "in_channels": 4}
IMAGE, VIDEO, ROWS = (4, 8, 8), (4, 2, 8, 8), (12, 4)
FLUX = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2}
FLUX |= {"joint_attention_dim": D, "axes_dims_rope": (2, 2, 4)}
WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": D, "ffn_dim": 24, "freq_dim": 8}
WAN |= {"num_layers": 4}
SANA = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 4, "caption_channels": D,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16,
}  # fmt: skip

MODELS = {
    "AuraFlowTransformer2DModel": {
        **HEADS, **PATCHES, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
        "joint_attention_dim": D, "caption_projection_dim": 16, "pos_embed_max_size": 64,
    },
    "BriaTransformer2DModel": {**FLUX, "guidance_embeds": False},
    "CogView4Transformer2DModel": {
        **HEADS, **PATCHES, "out_channels": 4, "num_layers": 4, "text_embed_dim": D,
        "time_embed_dim": 8, "condition_dim": 4, "rope_axes_dim": (8, 8), "sample_size": 8,
    },
    "Flux2Transformer2DModel": {
        **FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8,
        "guidance_embeds": True,
    },
    "FluxTransformer2DModel": {**FLUX, "pooled_projection_dim": 6, "guidance_embeds": True},
    "HunyuanVideoTransformer3DModel": {
        **HEADS, **PATCHES, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": D, "pooled_projection_dim": 6,
        "rope_axes_dim": (2, 2, 4), "guidance_embeds": True,
    },
    "LTXVideoTransformer3DModel": {
        **HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "num_layers": 4,
        "caption_channels": D,
    },
    "LongCatImageTransformer2DModel": {**FLUX, "pooled_projection_dim": 6},
    "Lumina2Transformer2DModel": {
        **PATCHES, "sample_size": 8, "hidden_size": 16, "num_layers": 4, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "cap_feat_dim": D,
        "axes_dim_rope": (4, 2, 2), "axes_lens": (32, 32, 32),
    },
    "OvisImageTransformer2DModel": {**FLUX, "out_channels": 4},
    "PRXTransformer2DModel": {
        **PATCHES, "context_in_dim": D, "hidden_size": 16, "num_heads": 2, "depth": 4,
        "axes_dim": [4, 4],
    },
    "PixArtTransformer2DModel": {
        **PATCHES, "num_attention_heads": 3, "attention_head_dim": 8, "out_channels": 8,
        "num_layers": 4, "cross_attention_dim": 24,
        "sample_size": 8, "caption_channels": D, "use_additional_conditions": True,
    },
    "QwenImageTransformer2DModel": {
        **HEADS, "in_channels": 4, "out_channels": 1, "patch_size": 2, "num_layers": 4,
        "joint_attention_dim": D, "axes_dims_rope": (2, 2, 4),
    },
    "SD3Transformer2DModel": {
        **HEADS, **PATCHES, "out_channels": 4, "sample_size": 8, "num_layers": 4,
        "joint_attention_dim": D, "caption_projection_dim": 16, "pooled_projection_dim": 6,
        "pos_embed_max_size": 8, "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    },
    "SanaTransformer2DModel": {
        **SANA, "sample_size": 8, "patch_size": 1, "timestep_scale": 0.001,
        "guidance_embeds": True,
    },
    "SanaVideoTransformer3DModel": {**SANA, "sample_size": 8},
    "SkyReelsV2Transformer3DModel": {**WAN, "num_frame_per_block": 2},
    "WanTransformer3DModel": WAN,
}  # fmt: skip
LAYERS = 4


def denoiser_model(kind, **options):
    """A model in evaluation mode with random weights everywhere."""
    diffusers = library("diffusers")
    made = getattr(diffusers, kind, None)
    if made is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    torch.manual_seed(0)
    model = made(**{**MODELS[kind], **options}).eval()
    generator = seeded(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


def denoiser_batch(kind, n=N):
    """A target, and what the forward of the model takes beside it."""
    generator = seeded(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch = {"encoder_hidden_states": normal(n, TEXT, D)}
    mask = torch.ones(n, TEXT, dtype=torch.int64)
    mask[1:, 3:] = 0
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    rows = {"img_ids": ids, "txt_ids": torch.zeros(TEXT, 3)}
    guidance = {"guidance": torch.full((n,), 3.0)}
    size = torch.tensor([[8.0, 8.0]]).repeat(n, 1)
    more = {
        "BriaTransformer2DModel": rows,
        "CogView4Transformer2DModel": dict.fromkeys(
            ("original_size", "target_size", "crop_coords"), size
        ),
        "Flux2Transformer2DModel": {
            name: torch.cat([value, value[:, :1]], dim=1) for name, value in rows.items()
        } | guidance,
        "FluxTransformer2DModel": {**rows, **guidance, "pooled_projections": normal(n, 6)},
        "HunyuanVideoTransformer3DModel": {
            **guidance, "pooled_projections": normal(n, 6), "encoder_attention_mask": mask,
        },
        "LTXVideoTransformer3DModel": {
            "encoder_attention_mask": mask, "num_frames": 1, "height": 3, "width": 4,
        },
        "LongCatImageTransformer2DModel": rows,
        "Lumina2Transformer2DModel": {"encoder_attention_mask": mask.bool()},
        "OvisImageTransformer2DModel": rows,
        "PRXTransformer2DModel": {"attention_mask": mask.bool()},
        "PixArtTransformer2DModel": {
            "added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / 8},
            "encoder_attention_mask": mask,
        },
        "QwenImageTransformer2DModel": {
            "img_shapes": [[(1, 3, 4)]] * n, "encoder_hidden_states_mask": mask.bool(),
        },
        "SD3Transformer2DModel": {"pooled_projections": normal(n, 6)},
        "SanaTransformer2DModel": {**guidance, "encoder_attention_mask": mask},
        "SanaVideoTransformer3DModel": {"encoder_attention_mask": mask},
    }  # fmt: skip
    batch |= more.get(kind, {})
    videos = "3DModel" in kind and kind != "LTXVideoTransformer3DModel"
    in_rows = kind == "LTXVideoTransformer3DModel" or "img_ids" in batch or "img_shapes" in batch
    shape = VIDEO if videos else ROWS if in_rows else IMAGE
    return {"images": normal(n, *shape), **batch}
