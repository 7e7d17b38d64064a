"""The report of runs: one page and the same in the terminal, from what run.h5 holds."""
