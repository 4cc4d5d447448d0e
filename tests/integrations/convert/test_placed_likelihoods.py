"""Likelihoods of padded texts whose positions are given."""

import pytest
import torch
from family_models import T, V, causal_model

from dblocks import BlocksConfig
from dblocks.integrations.convert import convert
from dblocks.sampling import likelihood, next_token_nll
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),
]
TOKENS = torch.randint(3, V, (2, T), generator=seeded(2))
MASK = torch.tensor([[1] * T, [0] * 3 + [1] * (T - 3)])
IDS = torch.arange(T).flip(0)


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("ids", [IDS, IDS[None], IDS.expand(2, -1)])
def test_positions_stay_those_of_their_tokens(rows, ids, monkeypatch):
    noise = 80 * torch.randn(T, 16, generator=seeded(3))
    top = lambda model, tokens, _: noise[: tokens.shape[1]].expand(len(tokens), -1, -1)
    monkeypatch.setattr(likelihood, "_noise_at_top", top)
    blocks = convert(causal_model("gpt2"), BlocksConfig(2), task="tokens", rows=rows)
    found = next_token_nll(blocks, TOKENS, attention_mask=MASK, position_ids=ids)
    alone = next_token_nll(blocks, TOKENS[1:, 3:], position_ids=IDS[3:])
    torch.testing.assert_close(found[1, 3:], alone[0], rtol=1e-4, atol=1e-4)
