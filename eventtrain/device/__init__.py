"""The device half: everything that touches JAX, and nothing that touches an event loop."""
