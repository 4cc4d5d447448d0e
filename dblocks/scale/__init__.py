"""One block's memory on a device, blocks on many machines, and checkpoints that no crash loses."""

from dblocks.scale.residency import Residency as Residency
from dblocks.scale.residency import resident as resident
