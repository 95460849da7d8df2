"""Learns from finished requests whose experts became known."""
