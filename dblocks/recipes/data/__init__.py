"""The data of runs: images, text and their batches."""
