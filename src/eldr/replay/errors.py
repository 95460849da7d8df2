"""The error of a replay that cannot be run."""

from eldr.errors import EldrError


class ReplayError(EldrError):
    """Raised when options, a trace or a load cannot be replayed. The message says why and what to change."""
