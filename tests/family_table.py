"""The page of the families that `convert` knows, from the list of the tests.

`PYTHONPATH=tests python tests/family_table.py` writes it again; a test holds it to the list.
"""

from denoiser_models import MODELS
from family_models import CAUSAL, SEQ2SEQ, TEXT, VISION

from dblocks.integrations.convert.denoiser_families import FAMILIES
from tools import ROOT

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Families of models

`convert` knows these families of transformers by the `model_type` of their config; every other one
is refused with an error that lists them. `python tests/family_table.py` writes this page from the
list of `tests/family_models.py`. For each family a test makes a small model with random weights and
the options below, and checks that

- the plain model gives the same logits bit for bit after the conversion;
- the converted rows give the plain model's logits, to rounding, where nothing is modulated: in a
  single stream and in doubled rows, or for all layers of an encoder;
- a step of one block moves no weight of another block;
- what is saved and loaded gives the same losses bit for bit.

Denoisers of diffusers are known by their class; for each a test checks beside this that one block
is the plain model without its other layers, in its estimate, loss and every gradient, and that no
layer is told which others run. Other models:
[what can be converted](convert.md#what-can-be-converted) lists timm's and diffusers' DiT.
"""
REFUSED = """## What is refused

Options that a converted model would not compute are an error of `convert`:

- `use_bidirectional_attention`, and layers that are neither of full nor of sliding attention;
- Falcon's dropouts, and `alibi` with `attn_implementation="eager"`; Bloom's
  `apply_residual_connection_post_layernorm`;
- `position_ids` in a batch for a model that counts positions by itself (ALiBi);
- PhiMoE's `sliding_window`, OPT's embeddings of another width (`word_embed_proj_dim`);
- ModernBERT's `classifier_pooling="mean"`; `head="learned"` where the classifier does not read rows
  of the layers' width, as in DINOv2;
- denoisers whose layers are told their number (Chroma, HiDream, controlnets) or use results of
  other layers (HunyuanDiT), two lists in turns (Latte), inputs in lists of tensors (Z-Image), a
  noise that is not known (CogView 3, CogVideoX, Cosmos), channels or patches beside the noisy ones;
- T5's and UMT5's `generate` of `dblocks.sampling`, and `cu_seqlens` in its batches;
- DeBERTa's `conv_kernel_size`, and `position_ids` with `position_biased_input=False`.

Of no family here: layers without a form, such as those of state spaces and linear attention;
other encoders with decoders; Data2Vec Vision, whose attention makes its own bias of the scores;
DINOv3 of transformers, which has no classifier there; that of timm can be converted.
"""


def options(given):
    """What of a test's options is no size."""
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
    """One table."""
    rows = [f"| `{kind}` | {options(given)} |" for kind, given in sorted(families.items())]
    head = ["| `model_type` | tested with |", "|---|---|"]
    return "\n".join([f"## {title}\n\n{len(families)} families.\n", *head, *rows, ""])


def denoisers():
    """The table of denoisers."""
    rows = [f"| `{kind}` | {took(kind)} |" for kind in sorted(MODELS)]
    head = ["| class | layers | predicts | needs | may take |", "|---|---|---|---|---|"]
    return "\n".join([f'## `task="images"`\n\n{len(rows)} families.\n', *head, *rows, ""])


def took(kind):
    """How one is called."""
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
        section("The same, of a decoder with its encoder as condition", SEQ2SEQ),
        section('`task="tokens"` with a `MaskSchedule`: masked tokens', TEXT),
        section('`task="classes"`', TEXT | VISION),
        denoisers(),
        REFUSED,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
