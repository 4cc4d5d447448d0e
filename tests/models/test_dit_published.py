"""The DiT here against the published one, typed again from the paper and its tensors' names."""

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import DiT, DiTConfig
from dblocks.models.patches import sincos_positions
from tools import randomized, seeded

SIZES = {"image_size": (4, 6), "channels": 3, "width": 24, "heads": 2, "num_classes": 5}


class PublishedAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / (D // self.heads) ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(N, T, D))


class PublishedMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x)
        tanh = torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
        return self.fc2(0.5 * x * (1 + tanh))


def modulated(norm_input, shift, scale):
    x = nnf.layer_norm(norm_input, norm_input.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class PublishedBlock(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.attn, self.mlp = PublishedAttention(dim, heads), PublishedMlp(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulated(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class PublishedFinal(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(x, shift, scale))


class PublishedTimestep(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        angle = t[:, None] * torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(128) / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class PublishedDiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, p = config.width, config.patch_size
        self.config = config
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(config.channels, D, p, stride=p)
        self.t_embedder = PublishedTimestep(D)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(config.num_classes + 1, D)
        hidden = int(D * config.mlp_ratio)
        self.blocks = nn.ModuleList(
            PublishedBlock(D, config.heads, hidden) for _ in range(config.depth)
        )
        self.final_layer = PublishedFinal(D, p * p * config.channels)

    def forward(self, x, t, y):
        N, C, H, W = x.shape
        p = self.config.patch_size
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        x = x + published_positions(self.config.width, H // p, W // p)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(N, H // p, W // p, p, p, C)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(N, C, H, W)


def published_positions(dim, rows, columns):
    """Its grid is meshgrid of (columns, rows): the first half of the width is the column's."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")

    def one(position):
        omega = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4.0))
        out = position.reshape(-1).double()[:, None] * omega[None]
        return torch.cat([out.sin(), out.cos()], dim=1)

    return torch.cat([one(x), one(y)], dim=1).float()


NAMES = {
    "x_embedder.proj": "patches",
    "t_embedder.mlp.0": "noise_embedding.fc1",
    "t_embedder.mlp.2": "noise_embedding.fc2",
    "y_embedder.embedding_table": "label_embedding",
    "final_layer.adaLN_modulation.1": "norm.modulation.linear",
    "final_layer.linear": "output_head",
}
LAYER_NAMES = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "adaLN_modulation.1": "modulation.linear",
}


def our_name(name):
    """The name here of a tensor of the published network, as the docstring of DiT has it."""
    module, tensor = name.rsplit(".", 1)
    if module.startswith("blocks."):
        _, index, rest = module.split(".", 2)
        return f"layers.{index}.{LAYER_NAMES[rest]}.{tensor}"
    return f"{NAMES[module]}.{tensor}"


def same_gradients(ours, published, outputs):
    """Values agree, and gradients of every tensor."""
    got, expected = outputs
    torch.testing.assert_close(got, expected)
    weights = torch.randn(got.shape, generator=seeded(9), dtype=got.dtype)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in published.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad)


def test_the_layer_and_the_final_layer_are_the_published_ones():
    ours = DiT(DiTConfig(**SIZES, depth=1)).double()
    layer, c = ours.layers[0], torch.randn(2, 24, generator=seeded(1), dtype=torch.float64)
    block = randomized(PublishedBlock(24, 2, 96).double())
    layer.load_state_dict(
        {
            our_name(f"blocks.0.{k}").removeprefix("layers.0."): v
            for k, v in block.state_dict().items()
        }
    )
    x = torch.randn(2, 6, 24, generator=seeded(2), dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    named = {
        our_name(f"blocks.0.{k}").removeprefix("layers.0."): p for k, p in block.named_parameters()
    }
    same_gradients(layer, named, (layer(inputs[0], c), block(inputs[1], c)))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)

    final = randomized(PublishedFinal(24, 12).double())
    state = {our_name(f"final_layer.{k}"): v for k, v in final.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert len(missing) == len(ours.state_dict()) - 4
    named = {our_name(f"final_layer.{k}"): p for k, p in final.named_parameters()}
    same_gradients(ours, named, (ours.output_head(ours.norm(x, c)), final(x, c)))


def test_a_published_state_dict_is_the_same_network():
    ours = DiT(DiTConfig(**SIZES, depth=6))
    published = randomized(PublishedDiT(ours.config))
    ours.load_state_dict({our_name(k): v for k, v in published.state_dict().items()})
    model, labels = DiffusionBlocks(ours, BlocksConfig(1)), torch.arange(4)
    z = torch.randn(4, 3, 4, 6, generator=seeded())
    sigma = torch.tensor([0.1, 0.5, 1.0, 7.0])
    level = model.config.schedule.level(sigma)
    f = published(level.c_in.view(-1, 1, 1, 1) * z, level.c_noise, labels)
    got = model.logits(z, sigma, labels=labels)
    torch.testing.assert_close(got, f, rtol=1e-4, atol=1e-4)
    denoised = level.c_skip.view(-1, 1, 1, 1) * z + level.c_out.view(-1, 1, 1, 1) * f
    torch.testing.assert_close(model(z, sigma, labels=labels), denoised, rtol=1e-4, atol=1e-4)
    null = published(level.c_in.view(-1, 1, 1, 1) * z, level.c_noise, torch.full((4,), 5))
    unconditional = model.bind(labels=labels, guidance_scale=0).logits(z, sigma)
    torch.testing.assert_close(unconditional, null, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns", "dim"), [(4, 4, 8), (2, 5, 24), (1, 1, 4)])
def test_positions_are_the_published_ones(rows, columns, dim):
    grid = (rows, columns)
    got = sincos_positions(grid, dim, native=grid)
    torch.testing.assert_close(got, published_positions(dim, rows, columns), rtol=0, atol=1e-7)
