"""Batches on their way to the training loop."""
