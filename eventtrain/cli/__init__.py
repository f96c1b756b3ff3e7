"""The command ``eventtrain``."""

from eventtrain.cli.main import app

__all__ = ["app"]
