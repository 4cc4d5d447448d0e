"""Attentions that are run by their own projections."""

import pytest
import torch
from family_models import causal_model

from dblocks.integrations.convert.own_attention import BloomAttention
from dblocks.integrations.convert.row_attention import CAUSAL


def test_an_attention_that_rotates_nothing_refuses_positions():
    model = causal_model("bloom")
    attention = BloomAttention(model.transformer.h[0].self_attention, CAUSAL)
    rows, angles = torch.randn(1, 3, 24), torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="must be None for a BloomAttention"):
        attention(rows, position_embeddings=(angles, angles))
