"""Several replicas of a router that decide as one: each tells the others what it runs."""
