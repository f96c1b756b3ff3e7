"""Checkpoints in an object store: upload and download."""
