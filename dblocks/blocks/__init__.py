"""Networks divided into blocks that are trained one at a time: losses and training step."""

from dblocks.blocks.bound import BoundDenoiser as BoundDenoiser
from dblocks.blocks.config import BlocksConfig as BlocksConfig
from dblocks.blocks.config import Weighting as Weighting
from dblocks.blocks.denoiser import Denoiser as Denoiser
from dblocks.blocks.denoiser import Draw as Draw
from dblocks.blocks.denoiser import Loss as Loss
from dblocks.blocks.denoiser import unwrapped as unwrapped
from dblocks.blocks.model import BlockModel as BlockModel
from dblocks.blocks.network import Block as Block
from dblocks.blocks.network import DiffusionBlocks as DiffusionBlocks
from dblocks.blocks.targets import Batch as Batch
from dblocks.blocks.targets import ClassTarget as ClassTarget
from dblocks.blocks.targets import Features as Features
from dblocks.blocks.targets import L2Target as L2Target
from dblocks.blocks.targets import MaskedTokenTarget as MaskedTokenTarget
from dblocks.blocks.targets import OutputHead as OutputHead
from dblocks.blocks.targets import Target as Target
from dblocks.blocks.targets import TokenTarget as TokenTarget
from dblocks.blocks.top import check_trained_at_top as check_trained_at_top
from dblocks.blocks.top import trained_at_top as trained_at_top
from dblocks.blocks.training import BlockOptimizers as BlockOptimizers
from dblocks.blocks.training import StepResult as StepResult
from dblocks.blocks.training import make_optimizers as make_optimizers
from dblocks.blocks.training import train_step as train_step
