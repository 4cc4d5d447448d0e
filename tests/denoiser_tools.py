"""What tests of converted denoisers measure them by."""

import copy
from itertools import pairwise

import numpy as np
import torch
from denoiser_models import denoiser_batch
from torch import nn
from torch.utils._pytree import tree_leaves

from dblocks import NoiseSchedule

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
