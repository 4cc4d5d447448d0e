"""Networks with the four parts of `dblocks.blocks.BlockModel`, one a file."""
