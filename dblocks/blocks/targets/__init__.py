"""Targets of prediction: each defines its checks of a batch, shape of the levels, and loss."""

from dblocks.blocks.targets.base import Batch as Batch
from dblocks.blocks.targets.base import Features as Features
from dblocks.blocks.targets.base import Target as Target
from dblocks.blocks.targets.classes import ClassTarget as ClassTarget
from dblocks.blocks.targets.classes import OutputHead as OutputHead
from dblocks.blocks.targets.l2 import L2Target as L2Target
from dblocks.blocks.targets.masked_tokens import MaskedTokenTarget as MaskedTokenTarget
from dblocks.blocks.targets.tokens import TokenTarget as TokenTarget
