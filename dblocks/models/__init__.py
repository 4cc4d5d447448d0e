"""Networks with the four parts of `dblocks.blocks.network.BlockModel`, one a file."""
