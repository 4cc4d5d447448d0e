"""Comparisons of block-wise with end-to-end training: `python -m benchmarks.study demo|results`.

`_base` runs what is missing and makes tables; each network has a file that says what is compared.
"""
