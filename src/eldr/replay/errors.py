"""Why a replay cannot be run."""

from eldr.errors import EldrError


class ReplayError(EldrError):
    """Options, a trace or a load that cannot be replayed; says why and what to change."""
