"""Fine-tuning a real pretrained model, MiniLM, on topics of sayings: end to end and in blocks."""
