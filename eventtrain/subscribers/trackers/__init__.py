"""Experiment trackers and metrics back ends."""
