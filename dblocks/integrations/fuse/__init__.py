"""`fuse_`: the fused ops in models that were written without them."""

from dblocks.integrations.fuse.apply import Replacement as Replacement
from dblocks.integrations.fuse.apply import fuse_ as fuse_
from dblocks.integrations.fuse.apply import register_fusion as register_fusion
from dblocks.integrations.fuse.apply import unfuse_ as unfuse_
from dblocks.integrations.fuse.dit import dit_block as dit_block
from dblocks.integrations.fuse.dit import dit_final_layer as dit_final_layer
from dblocks.integrations.fuse.ops import gated_add as gated_add
from dblocks.integrations.fuse.ops import gated_add_and_modulate as gated_add_and_modulate
from dblocks.integrations.fuse.ops import modulate as modulate
