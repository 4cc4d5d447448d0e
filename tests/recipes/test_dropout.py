"""`--dropout`, and all options of the paper's ViT together: the same bits however it is trained."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dblocks.__main__ import main
from dblocks.nn import TransformerLayer
from dblocks.recipes.dropout import Dropout
from dblocks.recipes.vit import ViTRun

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = ("train", "vit", "--steps", "8", "--batch-size", "8", "--width", "12", "--depth", "2")
VIT += ("--heads", "2", "--points", "1", "--blocks", "2")
ALL = ("--dropout", "0.3", "--crop", "pad", "--flip", "--rand-augment", "--ema", "0.6")


def train(out, *flags):
    assert main([*VIT, "--out", str(out), *flags]) == 0
    return (out / "model.safetensors").read_bytes()


def test_what_is_dropped_and_when():
    torch.manual_seed(0)
    layer = TransformerLayer(32, 4, 64, conditioning="none")
    x = torch.randn(50, 10, 32)
    plain = layer(x)
    dropout = Dropout(0.25, [[layer]], seed=1)
    seen = {}
    layer.mlp.register_forward_hook(lambda m, a, out: seen.update(mlp=out))
    assert torch.equal(layer(x), plain)
    before, state = seen["mlp"], torch.get_rng_state()
    with dropout.at(3, "cpu"):
        once = layer(x)
        dropped = seen["mlp"] == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer(x), plain)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.01)
    assert not (before == 0).any()
    with dropout.at(3, "cpu"):
        assert torch.equal(layer(x), once)
    with dropout.at(4, "cpu"):
        assert not torch.equal(layer(x), once)


def test_tokens_and_the_attention_s_probabilities_are_dropped_too():
    torch.manual_seed(0)
    layers = [TransformerLayer(32, 4, 64, conditioning="none") for _ in range(2)]
    dropout = Dropout(0.25, [layers], seed=1)
    tokens = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, a: tokens.append(a[0]))
    x = torch.ones(50, 10, 32)
    with dropout.at(0, "cpu"):
        layers[1](layers[0](x))
        q, k, v = (torch.randn(2, 4, 10, 8) for _ in range(3))
        some = layers[0].attention.attend(q, k, v)
    assert (tokens[0] == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert tokens[0].max() == pytest.approx(1 / 0.75)
    # Not again before the second layer: zeros are where tokens and both branches were dropped.
    assert (tokens[1] == 0).float().mean() == pytest.approx(0.25**3, abs=0.01)
    whole = layers[0].attention.attend(q, k, v)
    assert torch.equal(whole, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not torch.allclose(some, whole)


def test_the_same_bits_after_an_interruption_with_residency_and_from_jobs(tmp_path):
    once = train(tmp_path / "once", *ALL, "--checkpoint-every", "4")
    assert once != train(tmp_path / "other", *ALL, "--dropout", "0.2")
    shutil.copytree(tmp_path / "once", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints/step-00000008")
    assert train(tmp_path / "again", *ALL, "--resume") == once
    assert train(tmp_path / "resident", *ALL, "--resident") == once
    private = train(tmp_path / "private", *ALL, "--shared", "private")
    for block in ("0", "1"):
        assert main([*VIT, *ALL, "--block", block, "--out", str(tmp_path / "jobs")]) == 0
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "jobs")]) == 0
    assert (tmp_path / "merged/model.safetensors").read_bytes() == private
    train(tmp_path / "whole", *ALL, "--end-to-end")


def test_a_rate_that_is_none_is_refused_and_records_say_what_is_new():
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and less than 1, got 1\.0"):
        ViTRun(dropout=1.0)
    new = {"dropout", "crop", "flip", "rand_augment"}
    assert not new & ViTRun().to_dict().keys()
    run = ViTRun(dropout=0.1, crop="pad", flip=True, rand_augment=True)
    assert new <= run.to_dict().keys()
    assert ViTRun.from_dict(run.to_dict()) == run


def test_only_the_generators_of_the_cpu_and_of_its_device_are_touched(monkeypatch):
    """`torch.manual_seed` seeds those of all devices, of which one only would be restored."""
    seen = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("it seeds all devices"))

    class Device:
        def __init__(self, place):
            seen.append(str(place))

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    module = SimpleNamespace(device=Device, manual_seed=seen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda place: module)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kwargs: nullcontext())
    state = torch.get_rng_state()
    try:
        for device in ("cpu", "cuda:1"):
            with Dropout(0.25, [[TransformerLayer(8, 2, 8, conditioning="none")]], seed=1).at(
                3, device
            ):
                seed = torch.initial_seed()
    finally:
        torch.set_rng_state(state)
    assert seen == ["cuda:1", seed]
