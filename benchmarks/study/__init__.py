"""Comparisons of block-wise with end-to-end training: `python -m benchmarks.study demo|results`.

`experiment` runs what is missing and makes tables; each network has a file that says what is
compared; `archive` keeps the records.
"""
