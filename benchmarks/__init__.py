"""Benchmarks of the cost of observing a run; ``make bench`` runs them, and results are in ``benchmarks/results/``."""
