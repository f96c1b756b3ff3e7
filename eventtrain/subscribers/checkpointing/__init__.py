"""Checkpoints on disk: write, read, retain."""
