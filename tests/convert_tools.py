"""Small models of other libraries, made from configs with random weights, and their batches."""

import copy
from functools import cache, partial

import torch
from hub_tools import library

from dblocks import BlocksConfig, MaskSchedule, NoiseSchedule, make_optimizers, train_step
from dblocks.integrations.convert import ConvertedBlocks, convert
from tools import seeded

V, T, CLASSES = 23, 8, 5
BACKBONE = {"hidden_size": 16, "intermediate_size": 32}
BACKBONE |= {"num_hidden_layers": 4, "num_attention_heads": 4}
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
MASKED = ("bert", "roberta")
CLASSIFIERS = ("bert-classes", "roberta-classes", "vit", "timm", "timm-pooled")
CONDITIONED = (*CAUSAL, *MASKED, *CLASSIFIERS)
ALL = (*CONDITIONED, "dit")
MASK = 4
PUBLISHED = {"rows": "doubled", "head": "learned"}
SINGLE = {"rows": "single", "head": "posterior"}
FORMS = (PUBLISHED, SINGLE)
# Of attention in windows, in the models that have it.
WINDOWS = {
    "mistral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
}


def model_of(kind, **options):
    """A model in evaluation mode, the same one for the same arguments."""
    return copy.deepcopy(_made(kind, tuple(options.items())))


def task_of(kind):
    if kind in CAUSAL or kind in MASKED:
        return "tokens"
    return "images" if kind == "dit" else "classes"


def blocks_of(kind, num_blocks=2, *, model=None, config=None, **options):
    """The model, converted; options are those of `convert`."""
    schedule = MaskSchedule() if kind in MASKED else NoiseSchedule()
    if kind in MASKED:
        options.setdefault("mask_token_id", MASK)
    config = BlocksConfig(num_blocks, schedule=schedule, **(config or {}))
    model = model or model_of(kind)
    torch.manual_seed(0)  # after the model, which is drawn in the first call only
    return convert(model, config, task=task_of(kind), **options)


def shaken(blocks):
    """Moves all parameters: what starts at zero would hide much."""
    generator = seeded(1)
    with torch.no_grad():
        for p in blocks.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return blocks


def batch_of(kind, n=3):
    generator = seeded(2)
    labels = torch.arange(n) % CLASSES
    if kind in ("vit", "timm", "timm-pooled", "dit"):
        return {"images": torch.randn(n, 1, 8, 8, generator=generator), "labels": labels}
    tokens = torch.randint(MASK + 1, V, (n, T), generator=generator)
    return {"tokens": tokens} if task_of(kind) == "tokens" else {"tokens": tokens, "labels": labels}


def plain_logits(kind, model, batch):
    """What the model itself says."""
    if kind == "dit":
        time = torch.tensor([3, 500, 7])
        return model(batch["images"], timestep=time, class_labels=batch["labels"]).sample
    if kind.startswith("timm"):
        return model(batch["images"])
    if kind == "vit":
        return model(pixel_values=batch["images"]).logits
    return model(input_ids=batch["tokens"]).logits


def switch_on_checkpoints(model):
    """As users of each library do; transformers 4 checkpoints in the old way if not told."""
    if hasattr(model, "gradient_checkpointing_enable") and not hasattr(
        model, "activation_checkpointing_enable"
    ):
        kwargs = {"use_reentrant": False}
        return model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    # transformers, newest first; diffusers; timm.
    for name in (
        "activation_checkpointing_enable",
        "enable_gradient_checkpointing",
        "set_grad_checkpointing",
    ):
        if hasattr(model, name):
            return getattr(model, name)()
    raise AssertionError(f"{type(model).__name__} has no switch")


def without_dropout(blocks):
    for module in blocks.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # BERT's attention in transformers 4
            module.dropout_prob = 0.0
    return blocks


@cache
def _made(kind, options):
    torch.manual_seed(0)
    if kind.startswith("timm"):
        return _timm(kind, **dict(options)).eval()
    if kind == "dit":
        return _dit(**dict(options)).eval()
    transformers = library("transformers")
    grouped = {"num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": V}
    images = {"image_size": 8, "patch_size": 2, "num_channels": 1}
    family, _, task = kind.partition("-")
    name = {"gpt2": "GPT2", "bert": "Bert", "roberta": "Roberta", "vit": "ViT"}.get(
        family, family.capitalize()
    )
    sizes = {
        "gpt2": {"vocab_size": V, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32},
        "vit": {**BACKBONE, **images, "num_labels": CLASSES},
        "bert": {**BACKBONE, "vocab_size": V, "max_position_embeddings": 34},
        "qwen3": {**BACKBONE, **grouped, "head_dim": 4},
    }
    sizes["roberta"] = sizes["bert"]
    special = {"gpt2": {"bos_token_id": 0, "eos_token_id": 0}}
    head = {"gpt2": "LMHeadModel", "vit": "ForImageClassification"}
    head |= dict.fromkeys(MASKED, "ForMaskedLM")
    end = "ForSequenceClassification" if task == "classes" else head.get(family, "ForCausalLM")
    values = {**sizes.get(family, {**BACKBONE, **grouped}), **special.get(family, {})}
    if task == "classes":
        values["num_labels"] = CLASSES
    config = getattr(transformers, f"{name}Config")(**{**values, **dict(options)})
    return getattr(transformers, f"{name}{end}")(config).eval()


def _timm(kind, **options):
    library("timm")
    from timm.models.vision_transformer import VisionTransformer

    pooled = {"global_pool": "avg", "class_token": False, "init_values": 0.1}
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": CLASSES}
    sizes |= {"embed_dim": 16, "depth": 4, "num_heads": 4}
    return VisionTransformer(**{**sizes, **(pooled if kind == "timm-pooled" else {}), **options})


def _dit(**options):
    library("diffusers")
    from diffusers import DiTTransformer2DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "num_layers": 4}
    sizes |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": CLASSES}
    return DiTTransformer2DModel(**{**sizes, **options})


adamw = partial(torch.optim.AdamW, lr=1e-2)


def check_family(model, fresh, batch, own_logits, path, schedule=None, **options):
    """The model stays as it is; a step moves one block; files hold everything."""
    before = own_logits(model)
    config = BlocksConfig(2, schedule=schedule or NoiseSchedule())
    blocks = convert(model, config, **options)
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
