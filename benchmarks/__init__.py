"""Benchmarks: ``python -m benchmarks`` is the suite, ``python -m benchmarks.faults`` runs campaigns of faults."""
