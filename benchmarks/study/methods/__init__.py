"""Other ways to train a vision transformer without end-to-end gradients: a small file for each.

`run` says what a run of a method is, `units` what their trainers share.
"""
