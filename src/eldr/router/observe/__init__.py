"""Observability: counters, logs, traces and the decision log."""
