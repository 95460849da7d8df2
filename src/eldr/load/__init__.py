"""The load client: streams completions from a server and measures what its users would see."""
