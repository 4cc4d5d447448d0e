"""Networks of which one block is made alone."""

import torch
from torch import nn

from dblocks.blocks import BlocksConfig, L2Target
from dblocks.models import (
    CausalLM,
    CausalLMConfig,
    DiT,
    DiTConfig,
    MaskedLM,
    MaskedLMConfig,
    RecurrentConfig,
    RecurrentLM,
    ViT,
    ViTConfig,
)
from dblocks.schedules import MaskSchedule
from tools import SIZES

TEXT = {"vocab_size": 11, "width": 16, "heads": 2}
IMAGES = {**SIZES, "depth": 5, "channels": 3}
NETWORKS = {
    "vit": lambda: ViT(ViTConfig(**IMAGES, image_drop=0.1)),
    "dit": lambda: DiT(DiTConfig(**IMAGES)),
    "causal-lm": lambda: CausalLM(CausalLMConfig(**TEXT, depth=5)),
    "causal-lm, published": lambda: CausalLM(
        CausalLMConfig(**TEXT, depth=5, rows="doubled", head="learned", tied=False)
    ),
    "masked-lm": lambda: MaskedLM(MaskedLMConfig(**TEXT, depth=5)),
    "recurrent": lambda: RecurrentLM(RecurrentConfig(**TEXT, core=5)),
}


def config_of(network, shared, blocks=3):
    schedule = {"schedule": MaskSchedule()} if network == "masked-lm" else {}
    return BlocksConfig(num_blocks=blocks, shared=shared, **schedule)


class Layer(nn.Module):
    """Initialisers that look at what they drew, and at what there is."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.linear = nn.Linear(9, 9)
        nn.init.trunc_normal_(self.linear.weight, std=1.0, a=-0.5, b=0.5)
        self.scaled = nn.Parameter(0.1 * torch.randn(9, 9))
        self.turned = nn.Parameter(torch.empty(9, 9))
        nn.init.orthogonal_(self.turned)
        self.register_buffer("table", torch.arange(9).float().cos(), persistent=False)


class Own(nn.Module):
    """A network of somebody's own; `build_block` reads no more of it than this."""

    def __init__(self, layers=None, **extra):
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
        self.layers = nn.ModuleList(layers() if layers else [Layer(rate) for rate in rates])
        self.head = nn.Linear(9, 9)
        self.tied = self.head
        self.target = L2Target("images")
        for name, value in extra.items():
            setattr(self, name, value())

    def embed_condition(self, batch, drop):
        return None

    def run_layers(self, layers, z_in, level, condition):
        return z_in

    def features(self, hidden):
        return hidden


def scaled_together():
    layers = [nn.Linear(9, 9) for _ in range(4)]
    with torch.no_grad():
        torch._foreach_mul_([layer.weight for layer in layers], 0.5)
    return layers


def copied_together():
    layers = [nn.Linear(9, 9) for _ in range(4)]
    with torch.no_grad():
        torch._foreach_copy_([*layers[3].parameters()], [*layers[0].parameters()])
    return layers


def tied_own():
    """A network of which two modules outside the layers share a weight."""
    torch.manual_seed(0)
    network = Own()
    network.other = nn.Linear(9, 9)
    network.other.weight = network.head.weight
    return network
