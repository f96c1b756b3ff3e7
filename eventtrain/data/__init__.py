"""Batches on their way to the training loop: sources, prefetching, the loader for arrays."""
