"""The router's settings, and the form of a worker's address."""
