"""What can go wrong, in words a user can act on.

Each message is one sentence that ends with the remedy. The command line prints it and
exits with ``code``; a traceback is always a bug.
"""


class LrsdError(Exception):
    """Anything a user can cause; ``code`` is the exit status of the command line."""

    code = 1


class ModelError(LrsdError):
    """The model cannot be read, is not valid, or cannot be written."""


class UnsupportedModelError(ModelError):
    """The model is valid, but there is nothing in it that can be worked on."""


class DataError(LrsdError):
    """Samples are missing, malformed, or do not fit the model's inputs."""


class DeviceError(LrsdError):
    """The requested device or an optional package is not there."""


class BudgetError(LrsdError):
    """No plan meets the budget; the message says the nearest one that can be met."""

    code = 3


class VerificationError(LrsdError):
    """The rewritten model does not pass the checker or does not run."""
