"""The base class of eldr's errors. Their messages are shown to users: what is wrong, where, and what to do."""


class EldrError(Exception):
    """Base class of every error that eldr raises on purpose. The command line prints the message and exits with 2."""
