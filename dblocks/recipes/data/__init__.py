"""What runs train on: images, text and their batches."""
