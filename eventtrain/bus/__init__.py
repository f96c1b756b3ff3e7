"""The event bus: anyio, no jax.

``bus.py`` is what others see. Events come in by ``inbox.py`` (published) or ``training_stream.py`` (the loop's),
``roster.py`` knows who wants them; each ``subscription.py`` has a queue (``queues.py``) and a ``worker.py``.
``serving.py`` is one event loop at work; ``wake.py`` is the only crossing from other threads.
"""
