"""The event bus: anyio, no jax. ``bus.py`` routes, ``subscription.py`` hands out, ``queues.py`` buffers, ``wake.py`` wakes."""
