"""Child processes that end with their parent, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
HELPER_NICENESS = 10


def die_with(parent_pid: int) -> Callable[[], None]:
    """What a child process must call, before exec or after, to be killed as soon as the thread that started it ends."""

    def tie() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent died before the line above
            os._exit(1)

    return tie


def become_helper(parent_pid: int) -> None:
    """In a process that computes for its parent: give way to it, leave Ctrl-C to it, and end with it."""
    os.nice(HELPER_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent_pid)()
