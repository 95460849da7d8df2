"""Discrete-event replay of recorded expert activations over the policies that the router runs."""
