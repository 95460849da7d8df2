"""The fleet: which workers there are, their state, and how their requests turn out."""
