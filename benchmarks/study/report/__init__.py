"""The study's report: one HTML page made from the records that are there; nothing is run."""
