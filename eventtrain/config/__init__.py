"""Configuration files: which subscribers a run has, with which parameters, and how long it trains."""
