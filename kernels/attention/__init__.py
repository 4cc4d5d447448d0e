"""doubled_attention."""
