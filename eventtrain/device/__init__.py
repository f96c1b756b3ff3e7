"""Everything that runs on the accelerator: the compiled step, the metric ring, snapshots. JAX, no event loop."""
