"""The experiments of the paper as recipes: `dblocks train NETWORK --recipe paper --data NAME`.

DiffusionBlocks: Block-wise Neural Network Training via Diffusion Interpretation (Shing, Koyama,
    Akiba; ICLR 2026; arXiv 2506.14202, version 4). `images` and `texts` state the source of every
    value from the paper, and a reason for every value that the paper does not give.
"""

from dblocks.recipes.paper.experiment import Experiment as Experiment
from dblocks.recipes.paper.images import CIFAR10, CIFAR100, IMAGENET, TINY_IMAGENET
from dblocks.recipes.paper.texts import HUGINN, LM1B, OPENWEBTEXT, TEXT8

EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "vit": (CIFAR100, TINY_IMAGENET),
    "dit": (CIFAR10, IMAGENET),
    "masked-lm": (TEXT8,),
    "causal-lm": (LM1B, OPENWEBTEXT),
    "recurrent": (HUGINN,),
}
"""Experiments by network; the first one is the default without `--data`."""
