"""Files of a run: who writes to its folder, and its journal, which is read back as typed events. No JAX."""
