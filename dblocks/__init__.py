"""dblocks: fused noise-conditioned layers, and residual networks trained one block at a time."""

from dblocks import functional as functional
from dblocks._version import __version__ as __version__
from dblocks.blocks import BlockOptimizers as BlockOptimizers
from dblocks.blocks import BlocksConfig as BlocksConfig
from dblocks.blocks import DiffusionBlocks as DiffusionBlocks
from dblocks.blocks import Loss as Loss
from dblocks.blocks import StepResult as StepResult
from dblocks.blocks import make_optimizers as make_optimizers
from dblocks.blocks import train_step as train_step
from dblocks.integrations.convert.blocks import ConvertedBlocks as ConvertedBlocks
from dblocks.integrations.convert.blocks import convert as convert
from dblocks.integrations.fuse.apply import fuse_ as fuse_
from dblocks.integrations.fuse.apply import unfuse_ as unfuse_
from dblocks.sampling.euler import initial_noise as initial_noise
from dblocks.sampling.euler import sample_euler as sample_euler
from dblocks.sampling.euler import sample_logits as sample_logits
from dblocks.schedules.mask import MaskSchedule as MaskSchedule
from dblocks.schedules.noise import NoiseSchedule as NoiseSchedule
