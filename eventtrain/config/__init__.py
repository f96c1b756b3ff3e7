"""Runs described by a file: which subscribers, with which parameters, and for how long."""
