"""One block at a time on a device, blocks on many machines, and checkpoints."""

from dblocks.scale.checkpoints import Checkpoints as Checkpoints
from dblocks.scale.construction import build_block as build_block
from dblocks.scale.construction import load_block as load_block
from dblocks.scale.gathered import Gathered as Gathered
from dblocks.scale.merge import merge_blocks as merge_blocks
from dblocks.scale.merge import save_block as save_block
from dblocks.scale.mesh import data_parallel as data_parallel
from dblocks.scale.mesh import joined as joined
from dblocks.scale.pretrained import convert_block as convert_block
from dblocks.scale.residency import Residency as Residency
from dblocks.scale.residency import resident as resident
from dblocks.scale.shards import build_shards as build_shards
from dblocks.scale.sharing import average_shared as average_shared
from dblocks.scale.signals import Interrupted as Interrupted
from dblocks.scale.signals import Stop as Stop
