"""Every family of diffusers' denoisers that can be converted, beside the plain model."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from convert_tools import adamw
from denoiser_models import MODELS, denoiser_batch, denoiser_model
from torch import nn
from torch.utils._pytree import tree_leaves

from dblocks import BlocksConfig, NoiseSchedule, make_optimizers, train_step
from dblocks.integrations.convert import ConvertedBlocks, convert
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = NoiseSchedule(sigma_min=0.02, sigma_max=40.0, sigma_data=0.7)
# What each model's pipeline passes where all is noise, and whether its time and velocity run back.
TIMES = {
    "AuraFlowTransformer2DModel": 1.0,
    "Flux2Transformer2DModel": 1.0,
    "FluxTransformer2DModel": 1.0,
    "LongCatImageTransformer2DModel": 1.0,
    "Lumina2Transformer2DModel": 1.0,
    "OvisImageTransformer2DModel": 1.0,
    "PRXTransformer2DModel": 1.0,
    "QwenImageTransformer2DModel": 1.0,
    "SanaTransformer2DModel": 1.0,  # timestep_scale is .001
}
BACK = ("Lumina2Transformer2DModel",)
NOISES = ("PixArtTransformer2DModel",)


def condition(batch):
    return {name: value for name, value in batch.items() if name != "images"}


def over(value, z):
    return value.view(-1, *[1] * (z.ndim - 1))


def plain_denoised(kind, model, z, sigma, cond):
    """What the pipeline makes of z = y + sigma*eps: the model's own estimate of y, in float64."""
    s = sigma.double()
    if kind in NOISES:
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        known = np.log((1 - kept) / kept) / 2
        time = torch.from_numpy(np.interp(s.log().numpy(), known, np.arange(1000.0)))
        x = z.double() * over((1 + s**2).rsqrt(), z)
    else:
        time = s / (1 + s)
        x = z.double() / over(1 + s, z)
        time = (1 - time if kind in BACK else time) * TIMES.get(kind, 1000.0)
    own = model(hidden_states=x.float(), timestep=time.float(), return_dict=False, **cond)[0]
    own = own[:, : z.shape[1]].double()
    if kind in NOISES:
        return z - over(s, z) * own
    return (z - over(s, z) * (-own if kind in BACK else own)) / over(1 + s, z)


def cut(model, lists, first, last):
    """A copy of the plain model without the other layers."""
    model = copy.deepcopy(model)
    layers = [(path, i) for path in lists for i in range(len(model.get_submodule(path)))]
    for path in lists:
        kept = [model.get_submodule(p)[i] for p, i in layers[first:last] if p == path]
        setattr(model, path, nn.ModuleList(kept))
    return model


def close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_denoisers(kind, tmp_path):
    model, batch = denoiser_model(kind), denoiser_batch(kind)
    fresh, cond = copy.deepcopy(model), condition(batch)
    half = {"timestep": torch.full((2,), 0.5), "return_dict": False}
    with torch.no_grad():
        before = model(batch["images"], **half, **cond)[0]
        blocks = convert(model, BlocksConfig(2, schedule=SCHEDULE), task="images")
        assert model(batch["images"], **half, **cond)[0].equal(before)
        assert blocks.base_model(batch["images"], **half, **cond)[0].equal(before)
        whole = convert(copy.deepcopy(model), BlocksConfig(1, schedule=SCHEDULE), task="images")
        z, sigma = normal(*batch["images"].shape), torch.tensor([0.05, 7.0])
        close(whole(z, sigma, block=0, **cond), plain_denoised(kind, model, z, sigma, cond))

    lists = blocks.base_model.family.lists
    for block, (first, last) in enumerate(blocks.layer_ranges):
        part = cut(fresh, lists, first, last)
        draw = blocks.draw(batch, block, generator=seeded())
        result = blocks.loss_at(batch, block, draw)
        level = SCHEDULE.level(draw.sigma)
        z = SCHEDULE.corrupt(batch["images"], level, draw.seed).z
        denoised = plain_denoised(kind, part, z, draw.sigma, cond)
        error = (denoised - batch["images"]) / over(level.c_out, z)
        losses = error.square().flatten(1).mean(1)
        close(result.losses, losses)
        close(result.loss, losses.mean())
        result.loss.backward()
        losses.mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        names = dict(zip(blocks.base_model.names[first:last], left_names(part, lists), strict=True))
        expected = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
        renamed = {renamed_by(names, n): n for n in found}
        assert set(renamed) == set(expected)
        largest = max(grad.abs().max() for grad in expected.values())
        for name, grad in expected.items():
            difference = (found[renamed[name]] - grad).abs().max()
            assert difference <= 2e-4 * grad.abs().max() + 2e-6 * largest, name
        model.zero_grad()

    state = {name: value.clone() for name, value in blocks.state_dict().items()}
    optimizers = make_optimizers(blocks, lambda p: adamw(p, weight_decay=0.1))
    train_step(blocks, batch, optimizers, block=1, generator=seeded())
    moved = {n for n, value in blocks.state_dict().items() if not value.equal(state[n])}
    owners = {n: owner_of(blocks, p) for n, p in blocks.named_parameters()}
    assert {owners[name] for name in moved} == {1, None}
    assert 2 * sum(owners[n] == 1 for n in moved) > list(owners.values()).count(1)

    blocks.save_pretrained(tmp_path)
    again = ConvertedBlocks.from_pretrained(tmp_path, fresh)
    for b in range(2):
        losses = [m.loss(batch, b, generator=seeded()).loss for m in (blocks, again)]
        assert losses[0].equal(losses[1])


def owner_of(blocks, parameter):
    """The block of a parameter; None where it is shared."""
    for block in range(blocks.config.num_blocks):
        if any(p is parameter for p in blocks.block_parameters(block)):
            return block
    return None


def left_names(part, lists):
    return [f"{path}.{i}" for path in lists for i in range(len(part.get_submodule(path)))]


def renamed_by(names, name):
    for old, new in names.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def calls_of(layers, run):
    """What each layer is given and returns, as flat lists, in one run."""
    calls, handles = {}, []
    for name, layer in layers.items():

        def hook(module, args, kwargs, output, name=name):
            calls[name] = (tree_leaves((args, kwargs)), tree_leaves(output))

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return calls


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and one.equal(other)
    return one == other


def off_chain(calls, parts, lists):
    """Layers whose input depends on which others run, but for what the layer before returned."""
    bad = []
    for path in lists:
        names = [name for name in calls if name.startswith(f"{path}.")]
        second, returned = calls[names[1]][0], calls[names[0]][1]
        state = {i for i, value in enumerate(second) if any(value is r for r in returned)}
        assert state
        for before, name in pairwise(names):
            for i in state:
                if not any(calls[name][0][i] is value for value in calls[before][1]):
                    bad.append(name)
        for name in names:
            for i, value in enumerate(calls[name][0]):
                if i not in state and not same(value, parts[name][0][i]):
                    bad.append(name)
    return bad


def chain_of(kind, model, lists):
    """`off_chain` of the whole model and of the model without all layers but one, in turn."""
    cond = condition(denoiser_batch(kind))
    images = denoiser_batch(kind)["images"]
    names = [f"{path}.{i}" for path in lists for i in range(len(model.get_submodule(path)))]
    time = torch.full((2,), 0.25)

    def run(called):
        return lambda: called(hidden_states=images, timestep=time, **cond)

    calls = calls_of({name: model.get_submodule(name) for name in names}, run(model))
    parts = {}
    for i, name in enumerate(names):
        part = cut(model, lists, i, i + 1)
        layer = part.get_submodule(f"{name.rpartition('.')[0]}.0")
        parts |= calls_of({name: layer}, run(part))
    return off_chain(calls, parts, lists)


@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_a_chain_whichever_run(kind):
    """What `convert` relies on: layers see what the one before returned, and else the same."""
    model = denoiser_model(kind)
    family = convert(model, BlocksConfig(2), task="images").base_model.family
    assert not chain_of(kind, model, family.lists)


def test_every_family_is_tested():
    from dblocks.integrations.convert.denoiser_families import FAMILIES

    assert set(MODELS) == set(FAMILIES)
