"""How an engine takes a prefill and a decode leg: one file for each way."""
