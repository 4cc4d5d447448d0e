"""Levels of corruption: their distribution, their partition into blocks, and sampling grids."""

from dblocks.schedules.base import SCHEDULES as SCHEDULES
from dblocks.schedules.base import Schedule as Schedule
from dblocks.schedules.base import register as register
from dblocks.schedules.cosine import CosineNoiseSchedule as CosineNoiseSchedule
from dblocks.schedules.log_normal import NoiseSchedule as NoiseSchedule
from dblocks.schedules.log_uniform import LogUniformNoiseSchedule as LogUniformNoiseSchedule
from dblocks.schedules.mask import MASKED as MASKED
from dblocks.schedules.mask import MaskLevel as MaskLevel
from dblocks.schedules.mask import MaskSchedule as MaskSchedule
from dblocks.schedules.noise import EDMSchedule as EDMSchedule
from dblocks.schedules.noise import NoiseLevel as NoiseLevel
