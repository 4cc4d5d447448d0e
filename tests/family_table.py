"""The page of the families that `convert` knows, from the list of the tests.

`PYTHONPATH=tests python tests/family_table.py` writes it again; a test holds it to the list.
"""

from denoiser_models import MODELS
from family_models import CAUSAL, SEQ2SEQ, TEXT, VISION

from dblocks.integrations.convert.denoiser_families import FAMILIES
from tools import ROOT

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Model families

`convert` supports these families of transformers, named by the `model_type` of their config; for
any other it raises an error that lists them. `python tests/family_table.py` writes this page from
`tests/family_models.py`. For each family a test makes a small model with random weights and
the options below, and checks that

- the plain model's logits are bitwise the same after the conversion;
- without modulation, the converted rows give the plain model's logits up to rounding: in a
  single stream and in doubled rows, or for all layers of an encoder;
- a step of one block changes no weight of another block;
- saving and loading gives bitwise the same losses.

Denoisers of diffusers are listed by class; for each, a test also checks that one block
equals the plain model without its other layers, in its estimate, loss and every gradient, and that
no layer depends on which others run. For timm and diffusers' DiT see
[what can be converted](convert.md#what-can-be-converted).
"""
REFUSED = """## What is not supported

`convert` raises an error for options that a converted model would not compute:

- `use_bidirectional_attention`, and layers with neither full nor sliding attention;
- Falcon's dropouts, and `alibi` with `attn_implementation="eager"`; Bloom's
  `apply_residual_connection_post_layernorm`;
- `position_ids` in a batch for a model that computes positions itself (ALiBi);
- PhiMoE's `sliding_window`, OPT's embeddings of another width (`word_embed_proj_dim`);
- ModernBERT's `classifier_pooling="mean"`; `head="learned"` where the classifier's input does not
  have the layers' width, as in DINOv2;
- denoisers whose layers depend on their index (Chroma, HiDream, controlnets) or on results of
  other layers (HunyuanDiT), alternate between two lists (Latte), take lists of tensors (Z-Image),
  have an unknown noise schedule (CogView 3, CogVideoX, Cosmos), or channels or patches in addition
  to the noisy ones;
- T5 and UMT5 with `generate` of `dblocks.sampling`, and with `cu_seqlens` in its batches;
- DeBERTa's `conv_kernel_size`, and `position_ids` with `position_biased_input=False`.

No family here has state-space or linear-attention layers, or is another encoder-decoder. Data2Vec
Vision (its attention computes its own bias) and transformers' DINOv3 (it has no classifier) are not
supported; timm's DINOv3 is.
"""


def options(given):
    """Names of the tested options that are not sizes."""
    others = {k: v for k, v in given.items() if k not in SIZES and v is not None}
    kept = {k: v for k, v in others.items() if not isinstance(v, (dict, str))}
    return ", ".join(f"`{name}`" for name in sorted(kept)) or ""


SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "n_embd", "n_layer",
    "n_head", "n_positions", "n_ctx", "image_size", "patch_size", "num_channels", "dim", "dropout",
    "hidden_dim", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "max_seq_len",
    "dropout_rate", "decoder_start_token_id", "num_heads", "n_layers", "n_heads", "ffn_dim",
    "word_embed_proj_dim", "moe_intermediate_size",
}  # fmt: skip


def section(title, families):
    """A table of families."""
    rows = [f"| `{kind}` | {options(given)} |" for kind, given in sorted(families.items())]
    head = ["| `model_type` | tested with |", "|---|---|"]
    return "\n".join([f"## {title}\n\n{len(families)} families.\n", *head, *rows, ""])


def denoisers():
    """The table of diffusers' denoisers."""
    rows = [f"| `{kind}` | {took(kind)} |" for kind in sorted(MODELS)]
    head = ["| class | layers | predicts | needs | may take |", "|---|---|---|---|---|"]
    return "\n".join([f'## `task="images"`\n\n{len(rows)} families.\n', *head, *rows, ""])


def took(kind):
    """The cells of a denoiser: its layer lists, prediction and arguments."""
    family = FAMILIES[kind]
    needs = [f"`{name}`" for name in family.needs]
    needs += [f"`{name}` with `{flag}`" for name, flag in family.depends.items()]
    lists, takes = ([f"`{name}`" for name in names] for names in (family.lists, family.takes))
    return " | ".join(
        (", ".join(lists), family.prediction.name, ", ".join(needs), ", ".join(takes))
    )


def page():
    """The whole page."""
    parts = [
        HEAD,
        section('`task="tokens"` with a `NoiseSchedule`: the next token', CAUSAL),
        section("The same, for a decoder conditioned on its encoder", SEQ2SEQ),
        section('`task="tokens"` with a `MaskSchedule`: masked tokens', TEXT),
        section('`task="classes"`', TEXT | VISION),
        denoisers(),
        REFUSED,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
