"""The training loop: dispatches steps, waits at boundaries, applies commands, sends metrics to the bus."""
