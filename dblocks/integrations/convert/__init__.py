"""`convert`: wraps a model of another library for training in blocks."""

from dblocks.integrations.convert.apply import convert as convert
from dblocks.integrations.convert.blocks import ConvertedBlocks as ConvertedBlocks
from dblocks.integrations.convert.tasks import Task as Task
