"""The training loop. Start with ``train_loop.py``."""
