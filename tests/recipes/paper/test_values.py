"""The settings of the paper's experiments against the published values, copied here by hand.

Sources: arXiv 2506.14202v4, App. C, E and F; its released code for the ViTs; DiT is 2212.09748.
"""

import dataclasses

import pytest
import torch

from benchmarks.models.paper import run, settings
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.paper.networks import network_config, plan_of
from dblocks.scale.planner.subject import KINDS
from tools import ROOT

# Steps are blocks x epochs x whole batches; warm-up is in steps.
VIT = {
    "depth": 12, "patch_size": 4, "head": "learned", "noise_scale": None, "noise": "paper",
    "top_share": 0.0, "weighting": "batch_mean", "weight_decay": 0.01, "clip": 1.0,
    "conditioning": "official", "gate_init": 0.0, "dropout": 0.1, "flip": True,
    "rand_augment": True, "ema": None,
}  # fmt: skip
DIT = {
    "blocks": 3, "batch_size": 512, "patch_size": 2, "mlp_ratio": 4.0, "samples": 50_000,
    "sampling_steps": 50, "guidance_scale": 2.0, "sigma_data": 0.5, "weighting": "edm",
    "conditioning": "dit", "gate_init": 0.0, "ema": 0.9999, "weight_decay": 0.0,
    "decay": "constant", "warmup": 0,
}  # fmt: skip
LM = {
    "overlap": 0.1, "rows": "doubled", "head": "learned", "top_share": 0.0, "p_mean": -1.2,
    "p_std": 1.2, "sigma_data": 0.5, "weighting": "batch_mean", "conditioning": "dit",
    "batch_size": 256, "lr": 3e-4, "decay": "constant", "weight_decay": 0.0, "ema": None,
}  # fmt: skip
LLAMA = {"depth": 12, "width": 768, "heads": 12, "blocks": 4, **LM}
PUBLISHED = {
    ("vit", "cifar-100"): {
        "width": 128, "heads": 4, "blocks": 3, "batch_size": 128, "lr": 5e-4, "decay": "cosine",
        "lr_end": 5e-5, "crop": "pad", "mlp_ratio": 24.0, "steps": 3 * 500 * 390,
        "warmup": 3 * 10 * 390, **VIT,
    },
    ("vit", "tiny-imagenet"): {
        "width": 768, "heads": 12, "blocks": 2, "batch_size": 256, "lr": 1e-4, "warmup": 0,
        "decay": "constant", "crop": "resize", "mlp_ratio": 4.0, "steps": 2 * 100 * 390, **VIT,
    },
    ("dit", "cifar-10"): {
        "depth": 12, "width": 384, "heads": 6, "lr": 1e-4, "steps": 3 * 100 * 97, "flip": True,
        **DIT,
    },
    ("dit", "imagenet-latents"): {
        "depth": 24, "width": 1024, "heads": 16, "lr": 5e-5, "steps": 3 * 100 * 2502, **DIT,
    },
    ("masked-lm", "text8"): {
        "depth": 12, "width": 768, "heads": 12, "context": 256, "blocks": 3, "overlap": 0.05,
        "batch_size": 256, "lr": 3e-4, "weight_decay": 0.03, "warmup": 3 * 2000,
        "decay": "cosine", "schedule": "linear", "steps": 3 * 100 * 1373, "ema": 0.9999,
    },
    ("causal-lm", "lm1b"): {"context": 256, "warmup": 4 * 2500, "steps": 4 * 10 * 16_784, **LLAMA},
    ("causal-lm", "openwebtext"): {
        "context": 1024, "warmup": 4 * 2500, "steps": 4 * 10 * 35_858, **LLAMA,
    },
    ("recurrent", "lm1b"): {
        "prelude": 2, "depth": 4, "coda": 2, "width": 512, "heads": 8, "blocks": 1,
        "mean_recurrence": 32, "backprop_depth": 8, "steps": 15 * 16_784, **LM,
    },
}  # fmt: skip
# Millions, by hand. ViTs: the released code's, which has a last norm with weights. DiT: Table 1 of
# the paper, S/2 and L/2 for latents of ImageNet. Texts: attention and MLP of 12 or 8 layers.
PARAMETERS = {
    ("vit", "cifar-100"): 10.53, ("vit", "tiny-imagenet"): 92.98,
    ("dit", "cifar-10"): 32.5, ("dit", "imagenet-latents"): 458,
}  # fmt: skip
ALL = [experiment for found in EXPERIMENTS.values() for experiment in found]


def name(experiment):
    return experiment.network, experiment.data


def on_meta(experiment):
    config = network_config(experiment, run(experiment))
    with torch.device("meta"):
        return KINDS[type(config)](config)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: f"{e.network} {e.data}")
def test_settings_are_the_published_ones(experiment):
    made = run(experiment)
    expected = PUBLISHED[name(experiment)]
    found = {field: getattr(made, field) for field in expected}
    if "warmup" in expected:
        found["warmup"] = round(made.warmup * made.steps)
    assert found == expected
    assert {*PUBLISHED} == {name(e) for e in ALL}


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: f"{e.network} {e.data}")
def test_noise_levels_are_those_of_edm(experiment):
    made = run(experiment)
    if experiment.network == "masked-lm":
        assert made.blocks_config().schedule.kind == "linear"
        return
    if experiment.network == "dit":
        config = made.blocks_config(None)
    else:
        text = experiment.tokenizer
        config = made.blocks_config(made.blocks) if text else made.blocks_config()
    schedule = config.schedule
    assert (schedule.p_mean, schedule.p_std, schedule.sigma_data) == (-1.2, 1.2, 0.5)
    assert (schedule.sigma_min, schedule.sigma_max) == (0.002, 80.0)
    assert schedule.partition == "equal_mass"
    assert config.num_blocks == made.blocks
    assert config.overlap == (0.1 if experiment.tokenizer else 0.05)


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: f"{e.network} {e.data}")
def test_parameters(experiment):
    model = on_meta(experiment)
    if name(experiment) in PARAMETERS:
        expected = PARAMETERS[name(experiment)]
        assert size(model) / 1e6 == pytest.approx(expected, rel=2e-3)
        return
    # By hand: four square matrices and three of the MLP, and six modulations of a layer.
    D = model.config.width
    layer = 4 * D * D + 3 * D * model.config.hidden_dim
    assert model.config.hidden_dim == {768: 2048, 512: 1368}[D]
    layers = list(model.layers)
    assert sum(p.numel() for p in layers[0].parameters()) == pytest.approx(
        layer + 6 * D * (D + 1), rel=2e-3
    )
    assert len(layers) == run(experiment).depth


def test_dit_s_is_of_the_published_size_on_latents():
    small, large = EXPERIMENTS["dit"]
    sizes = {name: getattr(run(small), name) for name in ("depth", "width", "heads")}
    made = dataclasses.replace(run(large), **sizes)
    with torch.device("meta"):
        config = network_config(large, made)
        assert size(KINDS[type(config)](config)) / 1e6 == pytest.approx(33, rel=5e-3)
    assert config.label_drop == 0.1


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: f"{e.network} {e.data}")
def test_every_setting_has_its_source(experiment):
    assert not {*experiment.published} & {*experiment.ours}
    for setting, (_, source) in {**experiment.published, **experiment.ours}.items():
        assert source, setting
    sources = ("App.", "Sec.", "Eq.", "code:", "DiT")
    assert all(value.source.startswith(sources) for value in experiment.published.values())
    assert all(row.table.startswith("Table ") for row in experiment.rows)
    page = (ROOT / "docs" / "paper.md").read_text()
    assert settings(experiment) in page


def test_a_plan_takes_the_sizes_of_the_network():
    large = EXPERIMENTS["dit"][1]
    planned = plan_of(large, run(large))
    assert planned["depth"] == 24
    assert planned["batch_size"] == 512
    assert planned["blocks"] == 3
    assert planned["train_tokens"] == "128116700"
    assert planned["memory"] == "141GB"
