"""Subscribers that send the events of a run to a message broker: NATS, Redis."""
