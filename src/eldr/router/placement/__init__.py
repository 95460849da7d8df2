"""Placement: which request starts next, and on which workers."""
