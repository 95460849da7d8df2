"""Where workers come from: one file per source. The interface is in `base.py`."""
