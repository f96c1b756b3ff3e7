"""Commands on their way to the training thread, and what subscribers requested of a run."""
