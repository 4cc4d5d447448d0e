"""Sampling: Euler steps, text token by token, unmasking; and what texts cost, their likelihoods."""
