"""The parts of doubled_attention: its arguments, the choice of an implementation, and those."""
