"""The parts of doubled_attention: checks of arguments, and the implementations."""
