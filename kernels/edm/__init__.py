"""edm_denoise, edm_loss and euler_step."""
