"""Every family of models that can be converted, by one small model with unusual options."""

import copy

import pytest
import torch
from convert_tools import adamw, shaken
from family_models import CAUSAL, T, V, causal_model, clean_logits

from dblocks import BlocksConfig, make_optimizers, train_step
from dblocks.integrations.convert import ConvertedBlocks, convert
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
TOKENS = torch.randint(3, V, (2, T), generator=seeded(2))


def check_family(model, fresh, batch, own_logits, path, **options):
    """The model stays as it is; a step moves one block; files hold everything."""
    before = own_logits(model)
    blocks = convert(model, BlocksConfig(2), **options)
    assert own_logits(model).equal(before)
    assert own_logits(blocks.base_model).equal(before)

    shaken(blocks)
    state = {name: value.clone() for name, value in blocks.state_dict().items()}
    optimizers = make_optimizers(blocks, lambda p: adamw(p, weight_decay=0.1))
    train_step(blocks, batch, optimizers, block=1, generator=seeded())
    moved = {n for n, value in blocks.state_dict().items() if not value.equal(state[n])}
    ids = {id(p) for p in (*blocks.block_parameters(0),)}
    others = {n for n, p in blocks.named_parameters(remove_duplicate=False) if id(p) in ids}
    own = {id(p) for p in blocks.block_parameters(1)}
    trained = {n for n, p in blocks.named_parameters(remove_duplicate=False) if id(p) in own}
    assert others
    assert not moved & others
    # Experts that no token chose, and keys' biases, may have no gradient, but most do.
    assert 2 * len(moved & trained) > len(trained)

    blocks.save_pretrained(path)
    again = ConvertedBlocks.from_pretrained(path, fresh)
    for b in range(2):
        losses = [m.loss(batch, b, generator=seeded()).loss for m in (blocks, again)]
        assert losses[0].equal(losses[1])
        assert losses[0].isfinite()


@pytest.mark.parametrize("kind", CAUSAL)
def test_models_of_the_next_token(kind, tmp_path):
    model = causal_model(kind)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        own = model(input_ids=TOKENS, use_cache=False).logits
        for rows in ("single", "doubled"):
            ours = clean_logits(copy.deepcopy(model), TOKENS, rows)
            # Rounded at each of a few hundred operations; a wrong window or factor is far off.
            assert (ours - own[:, : ours.shape[1]]).abs().max() < 2e-5 * own.abs().max(), rows

    def own_logits(called):
        return called(input_ids=TOKENS, use_cache=False).logits

    check_family(model, fresh, {"tokens": TOKENS}, own_logits, tmp_path, task="tokens")
