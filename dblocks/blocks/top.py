"""Checks that every block was trained at the highest noise level, as products of blocks need."""

from __future__ import annotations

from dblocks.blocks.denoiser import Denoiser, top_share_of


def check_trained_at_top(model: Denoiser) -> None:
    """Raises unless every block was trained at the highest level."""
    config = model.config
    if config.num_blocks > 1 and not trained_at_top(model):
        raise ValueError(
            "the product of blocks needs blocks that were all trained at sigma_max, got "
            "BlocksConfig.top_share = 0; train with a top_share such as .6, or use the first block"
        )


def trained_at_top(model: Denoiser) -> bool:
    """Whether blocks after the first one were trained at the highest level too."""
    network, _ = model.parts(model.any_block())
    return top_share_of(model.config, network.target) > 0
