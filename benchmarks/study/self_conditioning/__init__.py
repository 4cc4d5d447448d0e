"""Blocks that see the prediction of the block before, without gradients: self-conditioning.

A variant of the benchmarks alone: networks with a further condition, and blocks that make it.
"""
