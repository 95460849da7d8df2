"""Property tests repeat the same cases on every run; HYPOTHESIS_PROFILE=explore draws new ones. None has a deadline: a
crowded machine is no failure."""

import os

from hypothesis import settings

settings.register_profile("repeat", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
