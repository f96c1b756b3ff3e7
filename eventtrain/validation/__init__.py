"""Checks of what users pass: arguments, and functions."""
