"""Every family of models that can be converted, by one small model with unusual options."""

import copy

import pytest
import torch
from convert_tools import check_family, shaken
from family_models import (
    CAUSAL,
    CLASSES,
    SEQ2SEQ,
    TEXT,
    VISION,
    T,
    V,
    causal_model,
    clean_logits,
    encoder_model,
)
from family_table import PAGE, page
from hub_tools import library

from dblocks import BlocksConfig, MaskSchedule
from dblocks.integrations.convert import convert
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
TOKENS = torch.randint(3, V, (2, T), generator=seeded(2))


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


@pytest.mark.parametrize("kind", TEXT)
def test_models_of_masked_tokens(kind, tmp_path):
    model = encoder_model(kind, "masks")
    fresh = copy.deepcopy(model)
    options = {"task": "tokens", "mask_token_id": 2}
    with torch.no_grad():
        own = model(input_ids=TOKENS).logits
        config = BlocksConfig(2, schedule=MaskSchedule())
        blocks = convert(copy.deepcopy(model), config, **options)
        network, level = blocks.base_model, blocks.config.schedule.level(torch.full((2,), 0.5))
        hidden = network.run_layers(network.layers, TOKENS, level, network.embed_condition({}))
        ours = network.family.head(network.model, hidden.x)
        assert (ours - own).abs().max() < 2e-5 * own.abs().max()

    def own_logits(called):
        return called(input_ids=TOKENS).logits

    check_family(model, fresh, {"tokens": TOKENS}, own_logits, tmp_path, MaskSchedule(), **options)


@pytest.mark.parametrize("kind", [*TEXT, *VISION])
def test_models_of_classes(kind, tmp_path):
    model = encoder_model(kind, "classes")
    fresh = copy.deepcopy(model)
    images = torch.randn(2, 1, 8, 8, generator=seeded(3))
    batch = {"images": images} if kind in VISION else {"tokens": TOKENS}
    batch["labels"] = torch.arange(2) % CLASSES
    masked = (
        {} if kind in VISION else {"attention_mask": torch.arange(T) < torch.tensor([[8], [5]])}
    )

    def own_logits(called, **mask):
        given = {"pixel_values": images} if kind in VISION else {"input_ids": TOKENS}
        return called(**given, **mask).logits

    with torch.no_grad():
        blocks = convert(copy.deepcopy(model), BlocksConfig(2), task="classes")
        network, level = blocks.base_model, blocks.config.schedule.level(torch.ones(2))
        for mask in ({}, masked):
            condition = network.embed_condition(batch | mask)
            z = torch.zeros(2, network.width)
            hidden = network.run_layers(network.layers, z, level, condition)
            family = network.family
            ours = family.head(network.model, family.pool(network.model, hidden.x))
            own = own_logits(model, **mask)
            assert (ours - own).abs().max() < 2e-5 * own.abs().max()
    check_family(model, fresh, batch, own_logits, tmp_path, task="classes")


def test_every_family_is_tested():
    library("transformers")
    from dblocks.integrations.convert import transformers as known

    assert {*CAUSAL, *SEQ2SEQ} == set(known.CAUSAL_FAMILIES)
    assert set(TEXT) == set(known.MASKED_FAMILIES)
    assert {*TEXT, *VISION} == set(known.CLASS_FAMILIES)


def test_the_page_of_families_is_that_of_this_list():
    """See `family_table`, which writes it."""
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("head", ["posterior", "learned"])
def test_bounded_logits_are_scored_as_they_are_predicted(head):
    blocks = shaken(convert(causal_model("gemma2"), BlocksConfig(2), task="tokens", head=head))
    batch = {"tokens": TOKENS, "loss_mask": torch.arange(T) < torch.tensor([[8], [5]])}
    draw = blocks.draw(batch, 1, generator=seeded())
    found = blocks.loss_at(batch, 1, draw).losses
    network, schedule = blocks.base_model, blocks.config.schedule
    z = schedule.corrupt(network.target.embed(batch), schedule.level(draw.sigma), draw.seed).z
    logits = blocks.logits(z, draw.sigma, block=1, tokens=TOKENS)
    costs = torch.nn.functional.cross_entropy(logits.mT, TOKENS, reduction="none")
    scored = batch["loss_mask"] & (torch.arange(T) > 0)
    torch.testing.assert_close(found, costs.where(scored, 0) * scored.numel() / scored.sum())
    if head == "learned":
        assert logits.abs().max() <= 0.9
    found.sum().backward()
    assert network.family.head(network.model).weight.grad.abs().max() > 0


# Options that are refused


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("falcon", {"alibi": True, "attn_implementation": "eager"}, "alibi=True with"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True"),
        ("falcon", {"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ("phimoe", {"sliding_window": 3}, "sliding_window=3"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim"),
    ],
)
def test_options_that_are_not_computed(kind, options, message):
    with pytest.raises(ValueError, match=f"must have no options .* got .*{message}"):
        convert(causal_model(kind, **options), BlocksConfig(2), task="tokens")


DEBERTA = [
    ("deberta", {"position_biased_input": False}),
    ("deberta", {"relative_attention": False}),
    ("deberta-v2", {"position_biased_input": False, "legacy": False}),
    ("deberta-v2", {"relative_attention": False, "type_vocab_size": 0}),
    ("deberta-v2", {"share_att_key": False, "pos_att_type": ["p2c"]}),
]


@pytest.mark.parametrize(("kind", "options"), DEBERTA)
def test_other_options_of_deberta(kind, options):
    config = BlocksConfig(2, schedule=MaskSchedule())
    model = encoder_model(kind, "masks", **options)
    blocks = convert(model, config, task="tokens", mask_token_id=2)  # which compares
    if options.get("position_biased_input", True):
        return
    batch = {"tokens": TOKENS, "position_ids": torch.arange(T).expand(2, T)}
    with pytest.raises(ValueError, match=r"position_ids must be None for a Deberta\w*ForMaskedLM"):
        blocks.loss(batch, 0)
    classes = convert(encoder_model(kind, "classes", **options), BlocksConfig(2), task="classes")
    with pytest.raises(ValueError, match="position_ids must be None"):
        classes.base_model.plain_loss(batch | {"labels": torch.arange(2)})


BEIT = [
    {"use_relative_position_bias": False},
    {"use_shared_relative_position_bias": False, "use_absolute_position_embeddings": True},
    {"use_mean_pooling": False, "layer_scale_init_value": 0.0},
]


@pytest.mark.parametrize("options", BEIT)
@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_other_options_of_beit(options, size):
    """Also with images of another size, to which biases are fitted."""
    model = encoder_model("beit", "classes", **options)
    blocks = convert(model, BlocksConfig(2), task="classes")
    if options.get("use_absolute_position_embeddings") and size != (8, 8):
        return
    network = blocks.base_model
    images = torch.randn(2, 1, *size, generator=seeded(3))
    with torch.no_grad():
        condition = network.embed_condition({"images": images})
        level = blocks.config.schedule.level(torch.ones(2))
        hidden = network.run_layers(network.layers, torch.zeros(2, 16), level, condition)
        found = network.family.head(model, network.family.pool(model, hidden.x))
        torch.testing.assert_close(found, model(pixel_values=images).logits, rtol=1e-4, atol=1e-4)


def test_families_that_are_refused_by_name():
    transformers = library("transformers")
    convolved = encoder_model("deberta-v2", "masks", conv_kernel_size=3)
    config = BlocksConfig(2, schedule=MaskSchedule())
    with pytest.raises(ValueError, match=r"conv_kernel_size=3 \(a convolution beside"):
        convert(convolved, config, task="tokens", mask_token_id=2)
    if "dinov3_vit" in transformers.CONFIG_MAPPING:
        model = transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model("dinov3_vit", **VISION["vit"])
        )
        with pytest.raises(ValueError, match=r"got 'dinov3_vit' .* no DINOv3 with a classifier"):
            convert(model, BlocksConfig(2), task="classes")


@pytest.mark.parametrize("task", ["masks", "classes"])
@pytest.mark.parametrize("kind", ["bert", "data2vec-text", "electra", "ernie", "roberta"])
def test_an_encoder_that_is_a_decoder_is_refused(kind, task):
    """Its rows do not see later ones, where a mask of padding hides nothing else."""
    model = encoder_model(kind, task, is_decoder=True)
    masked = {"schedule": MaskSchedule()} if task == "masks" else {}
    options = {"mask_token_id": 2} if task == "masks" else {}
    named = "tokens" if task == "masks" else "classes"
    with pytest.raises(ValueError, match=r"is_decoder=True \(rows that do not see later ones"):
        convert(model, BlocksConfig(2, **masked), task=named, **options)


def test_positions_that_a_model_counts_by_itself():
    for kind, options in (("bloom", {}), ("mpt", {}), ("falcon", {"alibi": True})):
        blocks = convert(causal_model(kind, **options), BlocksConfig(2), task="tokens")
        with pytest.raises(ValueError, match="'position_ids' too"):
            blocks.loss({"tokens": TOKENS, "position_ids": torch.arange(T).expand(2, T)}, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("kind", ["bloom", "falcon", "gpt_oss", "mpt"])
def test_biases_and_sinks_of_many_rows(kind, rows, dtype):
    """From 16 rows on PyTorch's attention is another one on CPUs."""
    if kind == "gpt_oss" and dtype == torch.float64:
        pytest.skip("its experts do not run in float64")
    options = {"alibi": True} if kind == "falcon" else {}
    model = causal_model(kind, **options).to(dtype)
    tokens = torch.randint(3, V, (2, 24), generator=seeded(4))
    with torch.no_grad():
        own = model(input_ids=tokens, use_cache=False).logits
        ours = clean_logits(copy.deepcopy(model), tokens, rows)
    # Rotations, biases and softmax of transformers are float32.
    assert (ours - own[:, : ours.shape[1]]).abs().max() < 2e-5 * own.abs().max()


def test_hooks_on_an_attention_whose_projections_run():
    model = causal_model("bloom")
    model.transformer.h[1].self_attention.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"must have no hooks .* on a BloomAttention"):
        convert(model, BlocksConfig(2), task="tokens")


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("kind", ["falcon", "bloom", "gpt_oss"])
def test_packed_documents_with_biases_and_sinks(kind, rows):
    blocks = shaken(convert(causal_model(kind), BlocksConfig(2), task="tokens", rows=rows))
    packed = {"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0, 5, 8], dtype=torch.int32)}
    z, sigma = torch.randn(1, T, blocks.base_model.width, generator=seeded(3)), torch.tensor(1.0)
    together = blocks.logits(z, sigma, block=0, **packed)
    for first, last in ((0, 5), (5, 8)):
        alone = blocks.logits(z[:, first:last], sigma, block=0, tokens=TOKENS[:1, first:last])
        found = together[:, first + 1 : last]
        torch.testing.assert_close(found, alone[:, 1:], rtol=1e-4, atol=1e-4)


def test_heads_that_are_not_computed():
    library("transformers")
    model = encoder_model("dinov2", "classes")
    with pytest.raises(
        ValueError, match=r"needs a classifier of rows of width 16, .* got one of 32"
    ):
        convert(model, BlocksConfig(2), task="classes", head="learned")
    model = encoder_model("modernbert", "classes")
    model.config.classifier_pooling = "mean"
    with pytest.raises(ValueError, match="classifier_pooling='mean'"):
        convert(model, BlocksConfig(2), task="classes")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("stablelm", {"use_parallel_residual": True}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("opt", {"do_layer_norm_before": False}),
        ("gemma3_text", {"attn_logit_softcapping": 0.7}),
        ("bloom", {"n_head": 4}),
        ("mpt", {"n_heads": 4, "attn_config": {"clip_qkv": 0.1, "softmax_scale": 0.7}}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("falcon", {"alibi": True}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False, "num_attention_heads": 2}),
        ("falcon", {"num_ln_in_parallel_attn": 1}),
        ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
        ("falcon", {"new_decoder_architecture": False, "parallel_attn": False}),
    ],
)
def test_other_options_of_these(kind, options):
    """Computed as the model does, or refused."""
    model = causal_model(kind, **options)
    with torch.no_grad():
        own = model(input_ids=TOKENS, use_cache=False).logits
        for rows in ("single", "doubled"):
            ours = clean_logits(copy.deepcopy(model), TOKENS, rows)
            assert (ours - own[:, : ours.shape[1]]).abs().max() < 2e-5 * own.abs().max(), rows
