"""Errors that are shown to people: what was wrong, where, and what to do."""


class EldrError(Exception):
    """Base of every error that eldr raises on purpose; the command line prints its text and exits with 2."""
