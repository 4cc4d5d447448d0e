"""What trained networks are judged by."""
