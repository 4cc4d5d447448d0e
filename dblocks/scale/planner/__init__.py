"""Plans training: memory and time for every number of blocks, without weights or measurements."""

from dblocks.scale.planner.costs import Costs as Costs
from dblocks.scale.planner.plan import Machine as Machine
from dblocks.scale.planner.plan import Planner as Planner
from dblocks.scale.planner.subject import of_network as of_network
