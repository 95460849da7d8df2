"""Discovery: where workers come from, one file per kind of source. `base.py` has the interface."""
