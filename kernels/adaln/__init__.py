"""adaln, residual_adaln and gated_residual."""
