"""What can be set, and how a worker is addressed."""
