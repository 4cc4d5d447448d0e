"""Training on real data: one file per network, with its recipe and commands."""
