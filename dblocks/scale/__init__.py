"""One block's memory on a device, blocks on many machines, and checkpoints that no crash loses."""
