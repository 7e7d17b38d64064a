"""Local search: one layer's replicas moved and exchanged, annealed, in compiled code."""
