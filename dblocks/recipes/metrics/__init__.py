"""Metrics of trained networks."""

NOISE_SEED = 7  # seed of the noise of evaluation and samples
