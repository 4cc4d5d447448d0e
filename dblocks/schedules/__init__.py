"""Levels of corruption: their distribution, their partition into blocks, and sampling grids."""

from dblocks.schedules.base import Schedule as Schedule
from dblocks.schedules.mask import MASKED as MASKED
from dblocks.schedules.mask import MaskLevel as MaskLevel
from dblocks.schedules.mask import MaskSchedule as MaskSchedule
from dblocks.schedules.noise import NoiseLevel as NoiseLevel
from dblocks.schedules.noise import NoiseSchedule as NoiseSchedule
