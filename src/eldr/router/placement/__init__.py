"""Which request starts, and on which workers."""
