"""One module for each campaign (``benchmarks/campaign.py``), run by ``python -m benchmarks.faults NAME``."""
