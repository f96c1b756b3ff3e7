"""Rows in files and in memory: CSV, JSON Lines, Parquet, history."""
