"""Subscribers that send commands: stop, change a hyperparameter, roll back, evaluate."""
