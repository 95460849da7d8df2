"""The vLLM connector: expert counts, the hand-off's lease, active experts. Imports nothing of the router."""
