"""Runs at the start of every Python process of the demo's workers, which have this folder in PYTHONPATH.

vLLM's engine sends tokens from a second thread, which needs Python's global lock. On a CPU, the first thread gives the
lock back at every operation of the model, many times a millisecond, and takes it again before the second thread is
awake. CPython makes the first thread wait only if the lock was not given back for a whole switch interval. With the
usual 5 ms that never happens: tokens stay behind for hundreds of milliseconds and arrive in bunches. On a GPU, the
first thread waits for the device and the second sends.
"""

import sys

sys.setswitchinterval(0.0001)
