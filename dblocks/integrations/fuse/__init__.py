"""`fuse_`: the fused ops in models that were written without them."""

from dblocks.integrations.fuse.apply import Replacement as Replacement
from dblocks.integrations.fuse.apply import fuse_ as fuse_
from dblocks.integrations.fuse.apply import unfuse_ as unfuse_
