"""What trained networks are judged by."""

NOISE_SEED = 7  # of the noise that evaluation and samples start from
