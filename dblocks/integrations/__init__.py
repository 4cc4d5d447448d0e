"""Other people's models: `convert` trains them in blocks, `fuse_` gives them the fused ops."""
