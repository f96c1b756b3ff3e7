"""Used by several groups of subscribers."""
