"""A small network with adaptive norms, whose fused forms the tests of `fuse_` register."""

from contextlib import contextmanager

import torch
from torch import nn

from dblocks.integrations.fuse import dit_block, dit_final_layer, register_fusion
from dblocks.integrations.fuse.fusion import REGISTERED
from tools import DEVICE, normal, randomized

N, T, D = 2, 6, 16


def modulated(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Mixer(nn.Module):
    """Stands for an attention: rows see each other."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear(x + x.mean(1, keepdim=True)).tanh()


class Block(nn.Module):
    def __init__(self, dim=D, affine=False, eps=1e-6, norm=nn.LayerNorm):
        super().__init__()
        self.norm1 = norm(dim, elementwise_affine=affine, eps=eps)
        self.attn = Mixer(dim)
        self.norm2 = norm(dim, elementwise_affine=affine, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulated(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim=D, affine=False, eps=1e-6):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=affine, eps=eps)
        self.linear = nn.Linear(dim, 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


class Network(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.final = FinalLayer(**options)

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final(x, c)


class Renamed(Block):
    """Runs the forward of Block."""


class Doubled(Block):
    def forward(self, x, c):
        return 2 * super().forward(x, c)


@contextmanager
def registered():
    """The fused forms of `Block` and `FinalLayer`, and at the end those of before."""
    before = dict(REGISTERED)
    register_fusion(Block, dit_block, "residual_adaln + gated_residual")
    register_fusion(FinalLayer, dit_final_layer, "adaln")
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def network(**options):
    return randomized(Network(**options)).to(DEVICE)


def inputs(dtype=torch.float32):
    return normal(N, T, D).to(dtype), normal(N, D, seed=1).to(dtype)
