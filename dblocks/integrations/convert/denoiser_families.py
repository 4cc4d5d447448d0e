"""The denoisers of diffusers that `convert` supports, and how each is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dblocks.integrations.convert.predictions import EPSILON, FLOW, Prediction

PROMPT = ("encoder_hidden_states",)
MASK = ("encoder_attention_mask",)
IDS = ("img_ids", "txt_ids")
TWO_STREAMS = ("transformer_blocks", "single_transformer_blocks")


@dataclass(frozen=True)
class DenoiserFamily:
    """How a class of models is called; its own forward runs.

    Its layers must form a chain: each takes the output of the one before it, and other arguments
    that do not depend on which layers run. Each family has a test of this.
    """

    needs: tuple[str, ...]
    """Arguments of its forward that a batch must hold."""
    takes: tuple[str, ...] = ()
    """Further arguments that a batch may hold."""
    depends: Mapping[str, str] = field(default_factory=dict)
    """Arguments that it needs where this attribute or number of its config is true, and else does
    not take."""
    whole: tuple[str, ...] = ()
    """Those arguments that all samples share: without a first dimension N."""
    lists: tuple[str, ...] = ("transformer_blocks",)
    """Paths of the lists of layers, in the order in which they run."""
    layout: str = "CHW"
    """The layout of a sample: C channels, F frames, H rows and W columns; or T patches."""
    prediction: Prediction = FLOW
    """The kind of its prediction."""
    time: float | str = 1000.0
    """The timestep of pure noise, or the name of the config entry that is a thousandth of it."""
    reversed: bool = False
    """Whether time runs from noise to data: time 1 - t, velocity y - eps."""

    def arguments(self, model: Any) -> tuple[set[str], set[str]]:
        """The arguments that a batch for this model must hold, and all that it may hold."""
        given = vars(model)
        needs = {n for n, flag in self.depends.items() if given.get(flag, model.config.get(flag))}
        needs |= set(self.needs)
        return needs, needs | set(self.takes)

    def timestep_scale(self, model: Any) -> float:
        """The timestep at time 1."""
        return 1000 * model.config[self.time] if isinstance(self.time, str) else self.time


WAN = DenoiserFamily(PROMPT, ("encoder_hidden_states_image",), lists=("blocks",), layout="CFHW")
FAMILIES = {
    "AuraFlowTransformer2DModel": DenoiserFamily(
        PROMPT, lists=("joint_transformer_blocks", "single_transformer_blocks"), time=1.0
    ),
    "BriaTransformer2DModel": DenoiserFamily(
        (*PROMPT, *IDS), whole=IDS, lists=TWO_STREAMS, layout="TC"
    ),
    "CogView4Transformer2DModel": DenoiserFamily(
        (*PROMPT, "original_size", "target_size", "crop_coords"), ("attention_mask",)
    ),
    "FluxTransformer2DModel": DenoiserFamily(
        (*PROMPT, "pooled_projections", *IDS),
        depends={"guidance": "guidance_embeds"},
        whole=IDS,
        lists=TWO_STREAMS,
        layout="TC",
        time=1.0,
    ),
    "Flux2Transformer2DModel": DenoiserFamily(
        (*PROMPT, *IDS),
        depends={"guidance": "guidance_embeds"},
        whole=IDS,
        lists=TWO_STREAMS,
        layout="TC",
        time=1.0,
    ),
    "HunyuanVideoTransformer3DModel": DenoiserFamily(
        (*PROMPT, *MASK, "pooled_projections"),
        depends={"guidance": "guidance_embeds"},
        lists=TWO_STREAMS,
        layout="CFHW",
    ),
    "LongCatImageTransformer2DModel": DenoiserFamily(
        (*PROMPT, *IDS), whole=IDS, lists=TWO_STREAMS, layout="TC", time=1.0
    ),
    "LTXVideoTransformer3DModel": DenoiserFamily(
        (*PROMPT, *MASK, "num_frames", "height", "width"),
        ("rope_interpolation_scale",),
        whole=("num_frames", "height", "width", "rope_interpolation_scale"),
        layout="TC",
    ),
    "Lumina2Transformer2DModel": DenoiserFamily(
        (*PROMPT, *MASK), lists=("layers",), time=1.0, reversed=True
    ),
    "OvisImageTransformer2DModel": DenoiserFamily(
        (*PROMPT, *IDS), whole=IDS, lists=TWO_STREAMS, layout="TC", time=1.0
    ),
    "PixArtTransformer2DModel": DenoiserFamily(
        PROMPT,
        MASK,
        depends={"added_cond_kwargs": "use_additional_conditions"},
        prediction=EPSILON,
    ),
    "PRXTransformer2DModel": DenoiserFamily(
        PROMPT, ("attention_mask",), lists=("blocks",), time=1.0
    ),
    "QwenImageTransformer2DModel": DenoiserFamily(
        (*PROMPT, "img_shapes"),
        ("encoder_hidden_states_mask",),
        depends={"additional_t_cond": "use_additional_t_cond"},
        layout="TC",
        time=1.0,
    ),
    "SanaTransformer2DModel": DenoiserFamily(
        PROMPT, MASK, depends={"guidance": "guidance_embeds"}, time="timestep_scale"
    ),
    "SanaVideoTransformer3DModel": DenoiserFamily(
        PROMPT, MASK, depends={"guidance": "guidance_embeds"}, layout="CFHW"
    ),
    "SD3Transformer2DModel": DenoiserFamily((*PROMPT, "pooled_projections")),
    "SkyReelsV2Transformer3DModel": DenoiserFamily(
        PROMPT,
        ("encoder_hidden_states_image",),
        depends={"fps": "inject_sample_info"},
        lists=("blocks",),
        layout="CFHW",
    ),
    "WanTransformer3DModel": WAN,
}


def family_of(model: Any) -> DenoiserFamily | None:
    """The family of a model of diffusers with the forward of its class; None for others."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("diffusers.") and kind.__name__ in FAMILIES:
            own = getattr(kind, "forward", None) is getattr(type(model), "forward", None)
            return FAMILIES[kind.__name__] if own else None
    return None
