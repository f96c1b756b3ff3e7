"""What subscribers and services ask of a run, and how it reaches the training thread."""
