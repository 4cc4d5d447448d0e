"""dblocks: fused noise-conditioned layers, and residual networks trained one block at a time."""

from dblocks import functional as functional
from dblocks._version import __version__ as __version__
from dblocks.blocks import BlocksConfig as BlocksConfig
from dblocks.blocks import DiffusionBlocks as DiffusionBlocks
from dblocks.blocks import Loss as Loss
from dblocks.convert import ConvertedBlocks as ConvertedBlocks
from dblocks.convert import convert as convert
from dblocks.fuse import fuse_ as fuse_
from dblocks.fuse import unfuse_ as unfuse_
from dblocks.mask_schedule import MaskSchedule as MaskSchedule
from dblocks.sample import initial_noise as initial_noise
from dblocks.sample import sample_euler as sample_euler
from dblocks.sample import sample_logits as sample_logits
from dblocks.schedule import NoiseSchedule as NoiseSchedule
from dblocks.train import BlockOptimizers as BlockOptimizers
from dblocks.train import StepResult as StepResult
from dblocks.train import make_optimizers as make_optimizers
from dblocks.train import train_step as train_step
