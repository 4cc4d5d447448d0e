"""One file per op: schema, fake kernel, implementations, autograd, checks and docstring."""

# The family of each op's kernels: `kernels/<family>`, `csrc/<family>` if it has C++, and
# `kernels/reference/_<family>.py` (for edm `_noise.py`). tests/ops/test_families.py checks that the
# files exist.
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
