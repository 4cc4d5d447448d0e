"""Ensembles of B denoisers of L/B layers, which take turns with the steps.

What an ensemble predicts is the mean of its members' estimates (DiT), or the normalised geometric
mean of their probabilities (masked language model). Each member sees all noise levels.
"""
