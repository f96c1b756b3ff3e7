"""The event bus: publish from any thread, one queue and one worker per subscription. anyio, no JAX.

Start with ``bus.py``, the public facade, and ``core.py`` behind it. Events arrive through ``publish_queue.py``
(published) or ``training_stream.py`` (from the training loop); ``routing_table.py`` finds the subscriptions to an
event; each ``subscription.py`` has a queue (``queues.py``), a filter (``filters.py``) and a worker (``worker.py``).
``runner.py`` runs them on one event loop. Only ``wakeup.py`` crosses from other threads.
"""
