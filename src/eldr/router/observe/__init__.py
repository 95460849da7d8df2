"""Counters, logs, traces and the decision log."""
