"""HTTP/1.1 towards clients and towards workers. Nothing here knows what is said over it."""
