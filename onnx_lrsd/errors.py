"""Errors that a user can cause.

Each message is one sentence that ends with the remedy. The command line prints it and exits with ``code``;
a traceback is always a bug.
"""


class LrsdError(Exception):
    """Anything a user can cause; ``code`` is the exit status of the command line."""

    code = 1


class ModelError(LrsdError):
    """The model cannot be read, is not valid, or cannot be written."""


class UnsupportedModelError(ModelError):
    """The model is valid, but has no layer that can be worked on."""


class DataError(LrsdError):
    """Samples are missing, malformed, or do not fit the model's inputs."""


class DeviceError(LrsdError):
    """A device or an optional package that was asked for is missing."""


class BudgetError(LrsdError):
    """No plan meets the budget; the message names the nearest budget that can be met."""

    code = 3


class VerificationError(LrsdError):
    """The rewritten model does not pass the checker or does not run."""
