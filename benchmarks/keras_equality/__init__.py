"""Runs random cases through the policies and through Keras' own callback objects, and records both."""
