"""Training on real data: a file a network, which is at once recipe and command."""
