"""One file an op: schema, fake kernel, device implementations, autograd, checks and docstring."""

# Which family's kernels compute an op: `kernels/<family>`, `csrc/<family>` where it has C++, and
# `kernels/reference/_<family>.py`. tests/ops/test_families.py holds the files to it.
FAMILIES = {
    "adaln": "adaln",
    "residual_adaln": "adaln",
    "gated_residual": "adaln",
    "noise_inject": "noise",
    "edm_denoise": "edm",
    "edm_loss": "edm",
    "euler_step": "edm",
    "doubled_attention": "attention",
    "linear_cross_entropy": "cross_entropy",
}
