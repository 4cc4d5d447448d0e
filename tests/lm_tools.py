"""What the tests of the autoregressive models set up in the same way."""

import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import CausalLM, CausalLMConfig, RecurrentConfig, RecurrentLM
from tools import DEVICE, randomized, seeded

KINDS = ("dit", "official", "none")
PUBLISHED = {"rows": "doubled", "head": "learned"}
SINGLE = {"rows": "single", "head": "posterior"}
SIZES = {"vocab_size": 11, "context": 12, "width": 16, "depth": 6, "heads": 4, "kv_heads": 2}
SIZES |= PUBLISHED
RECURRENT_SIZES = {"vocab_size": 11, "context": 24, "width": 16, "heads": 4, "kv_heads": 2}
RECURRENT_SIZES |= PUBLISHED
RECURRENT_SIZES |= {"mean_recurrence": 5, "backprop_depth": 8}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def lm_of(**options):
    torch.manual_seed(0)
    return CausalLM(CausalLMConfig(**{**SIZES, **options})).to(DEVICE)


def blocks_of(**options):
    return DiffusionBlocks(randomized(lm_of(**options)), BlocksConfig(3))


def recurrent_of(**options):
    torch.manual_seed(0)
    return RecurrentLM(RecurrentConfig(**{**RECURRENT_SIZES, **options})).to(DEVICE)


def recurrent_blocks_of(num_blocks=1, **options):
    return DiffusionBlocks(randomized(recurrent_of(**options)), BlocksConfig(num_blocks))


def tokens_of(n=2, length=8, seed=0):
    return torch.randint(11, (n, length), generator=seeded(seed)).to(DEVICE)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)
