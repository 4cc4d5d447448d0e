"""`convert`: a model of another library as a network in blocks."""
