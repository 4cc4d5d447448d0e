"""Models of other libraries: `convert` trains them in blocks, `fuse_` gives them the fused ops."""
