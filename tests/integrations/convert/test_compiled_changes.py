"""A compiled loss follows later changes of a converted model, or refuses them by name."""

import copy

import pytest
import torch
from convert_tools import batch_of, blocks_of

from tools import seeded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def halved(module, args, out):
    return out / 2


def later_hook(model):
    return model.model.layers[0].mlp.register_forward_hook(halved)


def later_part(model):
    norm = copy.deepcopy(model.model.layers[1].input_layernorm)
    norm.weight.data *= 2
    model.model.layers[1].input_layernorm = norm


def later_attribute(model):
    model.model.layers[0].self_attn.scaling = 5.0


def later_tokens(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.resize_token_embeddings(29)


@pytest.mark.parametrize("change", [later_hook, later_part, later_attribute, later_tokens])
@pytest.mark.parametrize("whole", [False, True], ids=["loss", "loss_at"])
def test_a_compiled_loss_follows_changes(change, whole):
    """`loss` looks at the model outside of its graphs; `loss_at` after the draw that it needs."""
    blocks = blocks_of("llama", 1).eval()
    model = blocks.base_model.model
    given = batch_of("llama")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    function = blocks.loss_at if whole else blocks.loss
    compiled = torch.compile(function, backend=backend, fullgraph=whole)

    def loss(run):
        if whole:
            return run(given, 0, blocks.draw(given, 0, generator=seeded(3))).loss
        return run(given, 0, generator=seeded(3)).loss

    before = loss(function)
    torch.testing.assert_close(loss(compiled), before)
    made = len(graphs)
    torch.testing.assert_close(loss(compiled), before)
    assert len(graphs) == made
    change(model)
    after = loss(function)
    assert after != before
    torch.testing.assert_close(loss(compiled), after)
    made = len(graphs)
    torch.testing.assert_close(loss(compiled), after)
    assert len(graphs) == made


@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_a_compiled_loss_refuses_what_would_not_run(taken):
    blocks = blocks_of("llama", 2).eval()
    model = blocks.base_model.model
    used = blocks.block(0) if taken else blocks
    torch._dynamo.reset()
    compiled = torch.compile(used.loss, backend="eager")
    compiled(batch_of("llama"), 0)
    hook = model.model.layers[0].register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"have no hooks|have the same hooks"):
        compiled(batch_of("llama"), 0)
    hook.remove()
    compiled(batch_of("llama"), 0)
