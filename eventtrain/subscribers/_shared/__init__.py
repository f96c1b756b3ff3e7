"""Modules that several groups of subscribers share."""
