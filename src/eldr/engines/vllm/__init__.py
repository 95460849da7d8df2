"""The vLLM connector: expert counts, hand-off leases and active experts. It imports nothing from the router."""
