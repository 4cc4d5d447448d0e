"""What the tests of masked diffusion set up in the same way."""

import itertools

import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks, MaskedTokenTarget
from dblocks.integrations.convert.heads import FunctionHead
from dblocks.models.masked_lm import Hidden, MaskedLM, MaskedLMConfig
from dblocks.schedules import MASKED, MaskSchedule
from tools import DEVICE, randomized, seeded

SIZES = {"vocab_size": 11, "context": 12, "width": 16, "depth": 6, "heads": 4, "kv_heads": 2}


def lm_of(**options):
    torch.manual_seed(0)
    return MaskedLM(MaskedLMConfig(**{**SIZES, **options})).to(DEVICE)


def blocks_of(num_blocks=3, schedule=None, *, shared="train", overlap=0.1, **options):
    config = BlocksConfig(
        num_blocks, schedule=schedule or MaskSchedule("cosine"), shared=shared, overlap=overlap
    )
    return DiffusionBlocks(randomized(lm_of(**options)), config)


def tokens_of(n=2, length=8, seed=0):
    return torch.randint(11, (n, length), generator=seeded(seed)).to(DEVICE)


class Exact(MaskedLM):
    """Knows a distribution of sequences, [V, V, ...], and predicts its exact posterior."""

    def __init__(self, p):
        V, T = p.shape[0], p.ndim
        super().__init__(MaskedLMConfig(vocab_size=V, context=T, width=4, depth=6, heads=2))
        self.p = p.double()
        self.x = torch.tensor(list(itertools.product(range(V), repeat=T)))

    def run_layers(self, layers, z_in, level, condition):
        if condition.known is not None:
            z_in = torch.where(condition.known == MASKED, z_in, condition.known)
        for layer in layers:
            layer.calls = getattr(layer, "calls", 0) + 1
        return Hidden(z_in.cpu(), None)

    @property
    def target(self):
        return MaskedTokenTarget(FunctionHead(lambda logits: logits), self.config)

    def features(self, hidden):
        z, x = hidden.x, self.x
        fits = ((z[:, None] == MASKED) | (z[:, None] == x)).all(-1)
        weight = fits * self.p.flatten()
        onehot = torch.nn.functional.one_hot(x, self.config.vocab_size).double()
        joint = torch.einsum("ns,stv->ntv", weight, onehot)
        return (joint / joint.sum(-1, keepdim=True)).clamp(min=1e-300).log().to(DEVICE)


def exact_of(p, num_blocks=3, schedule=None):
    config = BlocksConfig(num_blocks, schedule=schedule or MaskSchedule("cosine"), overlap=0)
    return DiffusionBlocks(Exact(p).to(DEVICE), config)


def distribution_of(V, T, seed=0):
    """A distribution of sequences whose tokens depend on each other."""
    return (
        (2 * torch.randn((V,) * T, generator=seeded(seed), dtype=torch.float64))
        .flatten()
        .softmax(0)
        .view((V,) * T)
    )


def independent_of(p, T):
    """A distribution of sequences of T independent tokens, each of distribution p."""
    joint = torch.ones((), dtype=torch.float64)
    for _ in range(T):
        joint = joint[..., None] * p
    return joint
