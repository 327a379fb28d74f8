"""Errors that a user can cause.

Each message is one sentence that ends with the remedy. The command line prints it and exits with ``code``;
a traceback is always a bug.
"""

from collections.abc import Callable
from string import Formatter


class LrsdError(Exception):
    """Anything a user can cause; ``code`` is the exit status of the command line."""

    code = 1


class ModelError(LrsdError):
    """The model cannot be read, is not valid, or cannot be written."""


class UnsupportedModelError(ModelError):
    """The model is valid, but has no layer that can be worked on."""


class DataError(LrsdError):
    """Samples are missing, malformed, or do not fit the model's inputs."""


class OptionError(LrsdError):
    """An option that is wrong, or does not go with another.

    ``template`` names options in braces, as Python has them. Those in ``values`` are named with what was
    given, so ``OptionError("{ratio} is too low: ...", ratio=-1)`` says 'ratio=-1 is too low: ...'.
    """

    code = 2

    def __init__(self, template: str, **values: object) -> None:
        self._template, self._values = template, values
        super().__init__(self.spelled(str, lambda name, value: f"{name}={value!r}"))

    def spelled(self, name: Callable[[str], str], given: Callable[[str, object], str]) -> str:
        """The sentence as another caller writes options: ``name(option)``, and ``given(option, value)``."""
        fields = {field for _, field, _, _ in Formatter().parse(self._template) if field}
        values = self._values
        return self._template.format(
            **{field: given(field, values[field]) if field in values else name(field) for field in fields}
        )


class DeviceError(LrsdError):
    """A device or an optional package that was asked for is missing."""


class BudgetError(LrsdError):
    """No plan meets the budget; the message names the nearest budget that can be met."""

    code = 3


class VerificationError(LrsdError):
    """The rewritten model does not pass the checker or does not run."""
