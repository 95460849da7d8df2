"""Discrete-event replay: runs the router's policies on recorded expert activations, without a GPU."""
