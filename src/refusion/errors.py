"""Everything that can go wrong for a user, as one small family of exceptions.

The command line prints the message of a `RefusionError` as one line and exits with 1; every message therefore says what was wrong
and what to do next.
"""


class RefusionError(Exception):
    """Base of all errors a caller is expected to read."""


class ConfigError(RefusionError):
    """A setting or a recipe is out of range, misspelt or contradictory."""


class CheckpointError(RefusionError):
    """A model is missing, damaged or lacks something that is needed."""


class RequestError(RefusionError):
    """A prompt or its sampling settings cannot be served."""


class DataError(RefusionError):
    """A row of a data file cannot be used; the message names file and line."""
