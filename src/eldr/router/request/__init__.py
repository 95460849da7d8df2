"""One completion, from its bytes to the last byte of its answer."""
