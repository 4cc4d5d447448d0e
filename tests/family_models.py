"""Small models of every family of language models that can be converted, with unusual options."""

import pytest
import torch
from hub_tools import library

from dblocks import BlocksConfig
from dblocks.blocks import Features
from dblocks.integrations.convert import convert

V, T, CLASSES = 23, 8, 5
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
SIZES |= {"head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": V, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT |= IDS
OWN_SIZES = ("bloom", "mpt")  # heads whose number is no power of two
SLIDING = ["sliding_attention", "full_attention"] * 2
WINDOW = {"sliding_window": 3, "layer_types": SLIDING}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 0.3, "residual_multiplier": 0.4,
    "attention_multiplier": 0.9,
}  # fmt: skip
MLA = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 6, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 8,
    "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
DEEP = {
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "moe_intermediate_size": 8, "n_shared_experts": 1,
}  # fmt: skip

CAUSAL = {
    "apertus": {},
    "arcee": {"mlp_bias": True, "attention_bias": True},
    "bitnet": {},
    "bloom": {"vocab_size": V, "hidden_size": 24, "n_layer": 4, "n_head": 6, **IDS},
    "codegen": {**GPT, "rotary_dim": 2, "n_ctx": 32},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.3, **WINDOW},
    "cohere2_moe": {**MOE, "logit_scale": 0.3, **WINDOW},
    "cwm": WINDOW,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "dots1": {**DEEP, "sliding_window": 3, "layer_types": SLIDING},
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8,
                     "moe_layer_start_index": 1},
    "exaone4": WINDOW,
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": True},
    "flex_olmo": MOE,
    "gemma": {},
    "gemma2": {**WINDOW, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 0.9,
               "query_pre_attn_scalar": 9},
    "gemma3_text": {**WINDOW, "final_logit_softcapping": 0.9, "query_pre_attn_scalar": 9},
    "glm": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4_moe": {**DEEP, "use_qk_norm": True, "partial_rotary_factor": 0.5},
    "gpt2": {**GPT, "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {**GPT, "multi_query": True},
    "gpt_neox": {"use_parallel_residual": True, "rotary_pct": 0.5},
    "gptj": {**GPT, "rotary_dim": 2},
    "gpt_oss": {**LOCAL, **WINDOW},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, **LOCAL},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jais2": {},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "ministral": WINDOW,
    "mistral": {"sliding_window": 3},
    "mixtral": {**LOCAL, "sliding_window": 3},
    "mpt": {"vocab_size": V, "d_model": 24, "n_layers": 4, "n_heads": 6, "max_seq_len": 32, **IDS},
    "nemotron": {"partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": 0.1},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {**MOE, "clip_qkv": 0.1},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},
    "persimmon": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True, "num_key_value_heads": 4},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 3},
    "phimoe": LOCAL,
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 8, "use_sliding_window": True,
                  "sliding_window": 3, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
    "qwen3_moe": {**MOE, "mlp_only_layers": [1]},
    "seed_oss": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "solar_open": DEEP,
    "stablelm": {"use_parallel_residual": False, "qk_layernorm": True, "use_qkv_bias": True,
                 "partial_rotary_factor": 0.5},
    "starcoder2": {"use_bias": True, "sliding_window": 3},
    "vaultgemma": {**WINDOW, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 0.9,
                   "query_pre_attn_scalar": 9},
    "youtu": MLA,
}  # fmt: skip

T5 = {"vocab_size": V, "d_model": 16, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
T5 |= {"num_decoder_layers": 4, "relative_attention_num_buckets": 6, "dropout_rate": 0.0}
T5 |= {"relative_attention_max_distance": 7, "decoder_start_token_id": 0}
SEQ2SEQ = {
    "mt5": {**T5, "feed_forward_proj": "gated-gelu"},
    "t5": T5,
    "umt5": {**T5, "feed_forward_proj": "gated-gelu"},
}
ENCODER = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
ENCODER |= {"num_attention_heads": 4, "max_position_embeddings": 34, "pad_token_id": 0}
IMAGES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
IMAGES |= {"num_attention_heads": 4, "image_size": 8, "patch_size": 2, "num_channels": 1}
DINO = {**IMAGES, "mlp_ratio": 2, "layerscale_value": 0.3}
ROBERTA = {**ENCODER, "pad_token_id": 1}
DEBERTA = {**ENCODER, "type_vocab_size": 2, "relative_attention": True}
DEBERTA |= {"pos_att_type": ["c2p", "p2c"]}
TEXT = {
    "bert": ENCODER,
    "camembert": ROBERTA,
    "data2vec-text": ROBERTA,
    "deberta": {**DEBERTA, "max_relative_positions": 4},
    "deberta-v2": {**DEBERTA, "position_buckets": 4, "max_relative_positions": 6,
                   "norm_rel_ebd": "layer_norm", "share_att_key": True},
    "distilbert": {"vocab_size": V, "dim": 16, "hidden_dim": 32, "n_layers": 4, "n_heads": 4,
                   "max_position_embeddings": 34, "sinusoidal_pos_embds": True},
    "electra": {**ENCODER, "embedding_size": 8},
    "ernie": ENCODER,
    "modernbert": {**ENCODER, "local_attention": 4, "global_attn_every_n_layers": 2},
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}  # fmt: skip
VISION = {
    "beit": {**IMAGES, "use_relative_position_bias": True, "layer_scale_init_value": 0.3,
             "use_shared_relative_position_bias": True, "drop_path_rate": 0.0},
    "clip": {"vision_config": IMAGES},
    "deit": IMAGES,
    "dinov2": DINO,
    "dinov2_with_registers": {**DINO, "num_register_tokens": 2},
    "siglip": {"vision_config": IMAGES},
    "vit": IMAGES,
    "vit_msn": IMAGES,
}  # fmt: skip


def skip_unless_known(kind):
    from dblocks.integrations.convert.transformers import NEEDS_5

    transformers = library("transformers")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    if transformers.__version__.startswith("4.") and kind in NEEDS_5:
        pytest.skip(f"{kind} is refused with transformers 4; see test_replaced.py")
    if transformers.__version__.startswith("4.") and kind == "stablelm":
        pytest.skip("this transformers makes no StableLM with qk_layernorm")


def encoder_model(kind, task, **options):
    """As `causal_model`, with a head for "masks" or "classes"."""
    transformers = library("transformers")
    skip_unless_known(kind)
    if kind == "beit" and transformers.__version__.startswith("4."):
        pytest.skip("this transformers has other layers of BEiT")
    given = (TEXT | VISION)[kind] | options
    config = transformers.AutoConfig.for_model(kind, **given, num_labels=CLASSES)
    if transformers.__version__.startswith("4.") and options.get("legacy", True) is False:
        pytest.skip("this transformers' own model with legacy=False does not run")
    auto = "ForMaskedLM" if task == "masks" else "ForSequenceClassification"
    auto = "ForImageClassification" if kind in VISION else auto
    if kind == "deit":  # which has two classes for this
        config.architectures = ["DeiTForImageClassification"]
    torch.manual_seed(0)
    return randomised(getattr(transformers, f"AutoModel{auto}").from_config(config).eval())


def seq2seq_model(kind, **options):
    """As `causal_model`."""
    transformers = library("transformers")
    config = transformers.AutoConfig.for_model(kind, **{**SEQ2SEQ[kind], **options})
    torch.manual_seed(0)
    return randomised(transformers.AutoModelForSeq2SeqLM.from_config(config).eval())


def causal_model(kind, **options):
    """A model whose every parameter is random, so that nothing is zero or one by chance."""
    transformers = library("transformers")
    skip_unless_known(kind)
    given = CAUSAL[kind]
    sizes = {} if "n_embd" in given or kind in OWN_SIZES else SIZES
    if kind == "falcon":  # which computes it
        sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **given, **options})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if transformers.__version__.startswith("4.") and "attn_logit_softcapping" in given:
        model.set_attn_implementation("eager")  # its SDPA leaves the bound out
    return randomised(model)


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def clean_logits(model, tokens, rows, **more):
    """Logits of the conditioned path: of its clean rows, or of rows whose noise has no size."""
    blocks = convert(model, BlocksConfig(2), task="tokens", rows=rows)
    network, schedule = blocks.base_model, blocks.config.schedule
    condition = network.embed_condition({"tokens": tokens, **more})
    level = schedule.level(torch.ones(len(tokens)))
    if rows == "single":
        z = torch.zeros(*tokens.shape, network.width)
        hidden = network.run_layers(network.layers, z, level, condition)
        x = hidden.x[:, 1:]
    else:
        x = torch.cat([condition.clean, condition.noisy], dim=1)
        cond = network.noise_embedding(level.c_noise)[:, None]
        for layer in network.layers:
            x = layer(x, cond, condition.attention, clean=cond.shape[1])
        x = x[:, : tokens.shape[1]]
    features = Features(network.family.leave(model, x))
    z = torch.zeros(*x.shape)
    return network.target.predict(features, z, level)
