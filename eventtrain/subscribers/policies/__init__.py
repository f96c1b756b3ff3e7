"""Subscribers that decide: stop, change a hyperparameter, roll back, evaluate."""
