"""Entries of a batch or call that nobody reads are refused by name."""

import dit_tools
import masked_tools
import pytest
import torch
from convert_tools import batch_of, blocks_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

import lm_tools
from dblocks.blocks import (
    Block,
    BlocksConfig,
    DiffusionBlocks,
    L2Target,
    make_optimizers,
    train_step,
)
from dblocks.models import ViT
from dblocks.sampling import sample_euler
from tools import batch, seeded, vit

MISTAKE = r"must hold only what is read, \[.*\], got {0!r} too; {1}"


def vit_blocks():
    return DiffusionBlocks(vit(), BlocksConfig(2))


NETWORKS = {
    "ViT": (vit_blocks, batch),
    "DiT": (lambda: dit_tools.blocks_of(2), dit_tools.batch_of),
    "CausalLM": (lm_tools.blocks_of, lambda: {"tokens": lm_tools.tokens_of()}),
    "RecurrentLM": (lm_tools.recurrent_blocks_of, lambda: {"tokens": lm_tools.tokens_of()}),
    "MaskedLM": (masked_tools.blocks_of, lambda: {"tokens": masked_tools.tokens_of()}),
    **{
        kind: (lambda kind=kind: blocks_of(kind), lambda kind=kind: batch_of(kind))
        for kind in ("llama", "bert", "bert-classes", "vit", "timm", "dit")
    },
}
CALLS = {
    "ViT": ["images"],
    "DiT": ["labels"],
    "CausalLM": ["attention_mask", "cu_seqlens", "tokens"],
    "RecurrentLM": ["attention_mask", "cu_seqlens", "tokens"],
    "MaskedLM": ["attention_mask"],
    "llama": ["attention_mask", "cu_seqlens", "position_ids", "tokens"],
    "bert": ["attention_mask", "position_ids", "token_type_ids"],
    "bert-classes": ["attention_mask", "position_ids", "token_type_ids", "tokens"],
    "vit": ["images"],
    "timm": ["images"],
    "dit": ["labels"],
}
NEAR = {"tokens": ("lossmask", "did you mean 'loss_mask'?"), "images": ("image", "'images'?")}


@pytest.mark.parametrize("name", NETWORKS)
def test_entries_that_nobody_reads(name):
    make, data = NETWORKS[name]
    blocks, given = make(), data()
    read = "tokens" if "tokens" in given else "images"
    wrong, hint = NEAR[read]
    if name == "bert-classes":
        wrong, hint = "attention_masks", "did you mean 'attention_mask'?"
    before = {n: p.clone() for n, p in blocks.state_dict().items()}
    optimizers = make_optimizers(blocks, torch.optim.SGD)
    for key, why in ((wrong, hint), ("weight", "leave out what is not read")):
        bad = given | {key: torch.ones(2)}
        message = MISTAKE.format(key, ".*" + why.replace("?", r"\?"))
        with pytest.raises(ValueError, match=message):
            train_step(blocks, bad, optimizers, block=0)
        with pytest.raises(ValueError, match=message):
            blocks.loss(bad, 0)
        with pytest.raises(ValueError, match=message):
            blocks.draw(bad, 0)
        call = {name: given[name] for name in CALLS[name] if name in given}
        with pytest.raises(ValueError, match=f"call for .* got '{key}' too"):
            blocks.bind(**call, **{key: torch.ones(2)})
        if hasattr(blocks.base_model, "plain_loss") and name != "dit":
            with pytest.raises(ValueError, match=message):
                blocks.base_model.plain_loss(bad)
        if hasattr(blocks.base_model, "next_token_loss"):
            with pytest.raises(ValueError, match=message):
                blocks.base_model.next_token_loss(bad)
    assert all(p.equal(before[n]) for n, p in blocks.state_dict().items())
    blocks.loss(given | {"weight": None}, 0)  # None says nothing
    first = blocks.block(0)
    assert isinstance(first, Block)
    with pytest.raises(ValueError, match="'weight' too"):
        first.loss(given | {"weight": torch.ones(2)})


@pytest.mark.parametrize("name", NETWORKS)
def test_a_call_refuses_what_training_alone_reads(name):
    make, data = NETWORKS[name]
    blocks, given = make(), data()
    if "tokens" in given and name != "bert-classes":
        given["loss_mask"] = torch.ones_like(given["tokens"], dtype=torch.bool)
    blocks.loss(given, 0)
    network = blocks.base_model
    assert sorted(network.call_reads) == CALLS[name]
    call = {key: value for key, value in given.items() if key in CALLS[name]}
    only = sorted(given.keys() - call.keys())
    assert only
    blocks.bind(**call, **dict.fromkeys(only))  # None says nothing
    z, sigma = torch.zeros(2, 3), torch.tensor(1.0)
    sampled = lambda **cond: sample_euler(blocks, z, [80.0, 5.0, 0.3, 0.01], **cond)
    for key in only:
        why = rf"call for .* got '{key}' too; training reads it, and a call does not: leave it out"
        for run in (
            blocks.bind,
            lambda **cond: blocks(z, sigma, block=0, **cond),
            lambda **cond: blocks.logits(z, sigma, block=0, **cond),
            lambda **cond: blocks.block(0).logits(z, sigma, **cond),
            lambda **cond: AveragedModel(blocks).module.bind(**cond),
            *([] if name in ("MaskedLM", "bert") else [sampled]),
        ):
            with pytest.raises(ValueError, match=why):
                run(**call, **{key: given[key]})


def test_private_copies_and_all_keys_at_once():
    blocks = DiffusionBlocks(vit(), BlocksConfig(2, shared="private"))
    for held in (blocks, blocks.block(1)):
        with pytest.raises(ValueError, match=r"\['images', 'labels'\], got 'a', 'b' too"):
            held.loss({**batch(), "a": 1, "b": 2}, 1)
        with pytest.raises(ValueError, match=r"ViT must hold only .* got 'a' too"):
            held(torch.zeros(8, 12), torch.tensor(0.1), block=1, images=batch()["images"], a=1)


def test_a_compiled_call_refuses_too():
    blocks, images = vit_blocks(), batch()["images"]
    z, sigma = torch.zeros(len(images), blocks.base_model.config.width), torch.tensor(1.0)
    call = torch.compile(blocks, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ViT must hold only .* got 'image' too"):
        call(z, sigma, block=0, images=images, image=images)


# Networks of one's own that name nothing


class Own(nn.Module):
    target = L2Target("points")

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def embed_condition(self, batch, drop):
        return batch["ring"]

    def run_layers(self, layers, z_in, level, condition):
        for layer in layers:
            z_in = layer(z_in) + condition[:, None]
        return z_in

    def features(self, hidden):
        return hidden


class ReadsMore(ViT):
    def embed_condition(self, batch, drop=None):
        return super().embed_condition(batch, drop) + batch["extra"]


class Weighted(L2Target):
    def score(self, features, z, level, y, seed, batch):
        return super().score(features, z, level, y, seed, batch) * batch["weight"]


def test_networks_and_targets_of_ones_own_read_what_they_like():
    given = {"points": torch.ones(3, 2), "ring": torch.ones(3)}
    network = Own()
    blocks = DiffusionBlocks(network, BlocksConfig(2))
    blocks.loss(given, 0)
    network.reads = ("ring",)
    network.target = Weighted("points")
    plain = DiffusionBlocks(network, BlocksConfig(2))
    once = plain.loss(given | {"weight": 1.0}, 0, generator=seeded()).loss
    assert plain.loss(given | {"weight": 2.0}, 0, generator=seeded()).loss.equal(2 * once)
    network.target = L2Target("points")
    with pytest.raises(ValueError, match=r"Own .* \['points', 'ring'\], got 'rings' too"):
        plain.loss(given | {"rings": 1}, 0)

    more = ReadsMore(vit().config)
    more.load_state_dict(vit().state_dict())
    with torch.no_grad():
        blocks = DiffusionBlocks(more, BlocksConfig(2))
        losses = [
            blocks.loss(batch() | {"extra": extra}, 1, generator=seeded()).loss
            for extra in (0.0, 1.0)
        ]
        assert losses[0].isfinite()
    more.reads = ("extra",)
    with pytest.raises(ValueError, match=r"\['extra', 'images', 'labels'\], got 'extras'"):
        blocks.loss(batch() | {"extra": 0.0, "extras": 1.0}, 1)


def test_a_network_of_ones_own_names_what_a_call_reads():
    network = Own()
    network.reads = ("ring",)
    blocks = DiffusionBlocks(network, BlocksConfig(2))
    cond = {"ring": torch.ones(3), "points": torch.ones(3, 2)}
    blocks.bind(**cond)  # not said
    network.call_reads = ("ring",)
    with pytest.raises(ValueError, match=r"Own .* \['ring'\], got 'points' too; training reads"):
        blocks.bind(**cond)
    more = ReadsMore(vit().config)  # another embed_condition than that of the class that says
    DiffusionBlocks(more, BlocksConfig(2)).bind(images=batch()["images"], extra=0.0)


def test_a_dit_without_classes_has_calls_without_labels():
    blocks = dit_tools.blocks_of(2, num_classes=0)
    blocks.loss(dit_tools.batch_of(), 0)
    with pytest.raises(ValueError, match=r"only what is read, \[\], got 'labels' too"):
        blocks.bind(labels=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("given", [(torch.zeros(2, 3),), [1], torch.zeros(2, 3), None])
def test_a_batch_is_a_mapping(given):
    model = DiffusionBlocks(vit(), BlocksConfig(2))
    with pytest.raises(TypeError, match="batch must be a mapping of names to tensors, got"):
        model.loss(given, 0)
