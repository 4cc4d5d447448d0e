"""`convert`: a model of another library as a network in blocks."""

from dblocks.integrations.convert.blocks import ConvertedBlocks as ConvertedBlocks
from dblocks.integrations.convert.blocks import Task as Task
from dblocks.integrations.convert.blocks import convert as convert
