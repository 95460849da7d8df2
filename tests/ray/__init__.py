"""The example for Ray Serve, where Ray is installed."""
