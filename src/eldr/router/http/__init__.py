"""HTTP/1.1 towards clients and towards workers. Nothing here knows what the messages mean."""
