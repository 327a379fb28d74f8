"""What an option is: its help, and the values that it takes.

The API checks by it, the command line and the file of ``--config`` are made from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from onnx_lrsd.errors import OptionError
from onnx_lrsd.time_limit import seconds_of
from onnx_lrsd.wording import bytes_of


class AllowedValues(Protocol):
    """The values that an option takes."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError, with the remedy, unless the option ``name`` takes ``value``."""


@dataclass(frozen=True)
class Option:
    """An option of a dataclass, in the annotation of its field: ``Annotated[int, Option(...)]``.

    ``default`` says in words what happens where the option is not given; empty where the field's own default
    says it.
    """

    help: str
    takes: AllowedValues
    metavar: str = ""
    default: str = ""


def options_of(holder: type) -> dict[str, tuple[Option, Any]]:
    """Each option of a dataclass, by the name of its field, with the field's default."""
    hints = get_type_hints(holder, include_extras=True)
    found = {}
    for entry in fields(holder):
        for note in getattr(hints[entry.name], "__metadata__", ()):
            if isinstance(note, Option):
                assert entry.default is not MISSING, f"{entry.name} has no default"
                found[entry.name] = note, entry.default
    return found


def check_options(holder: Any) -> None:
    """Check each option of a dataclass by itself. Raises OptionError for the first that is wrong."""
    for name, (option, default) in options_of(type(holder)).items():
        value = getattr(holder, name)
        if value is not None or default is not None:
            option.takes.check(name, value)


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is neither True nor False."""
        if not isinstance(value, bool):
            raise OptionError(f"{{{name}}} is neither True nor False: give one.", **{name: value})


@dataclass(frozen=True)
class OneOf:
    """One of the names ``offered``; ``spelled`` are those that the command line writes otherwise."""

    offered: Collection[str]
    spelled: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is none of the names."""
        if not (isinstance(value, str) and value in self.offered):
            raise OptionError(
                f"{{{name}}} is none of {', '.join(self.offered)}: choose one of them.", **{name: value}
            )


@dataclass(frozen=True)
class SomeOf:
    """Some of the names ``offered``, at least one."""

    offered: Collection[str]

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no list of the names."""
        listed = value if isinstance(value, tuple | list) else ()
        if not listed or any(entry not in self.offered for entry in listed):
            raise OptionError(
                f"{{{name}}} is no list of some of {', '.join(self.offered)}: choose from them.",
                **{name: value},
            )


@dataclass(frozen=True)
class Number:
    """A finite number from ``least`` to ``most``."""

    least: float
    most: float = math.inf

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no number, or out of bounds."""
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
        if math.isfinite(number) and self.least <= number <= self.most:
            return
        bounds = f"at least {self.least:g}" if self.most == math.inf else f"{self.least:g} to {self.most:g}"
        wanted = f"a number {'of' if self.most == math.inf else 'from'} {bounds}"
        raise OptionError(f"{{{name}}} is not {wanted}: give one.", **{name: value})


@dataclass(frozen=True)
class Numbers:
    """Finite numbers of at least ``least``, at least one of them."""

    least: float

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no list of such numbers."""
        try:
            if not isinstance(value, tuple | list) or not value:
                raise OptionError("", **{name: value})
            for one in value:
                Number(self.least).check(name, one)
        except OptionError:
            raise OptionError(
                f"{{{name}}} is no list of numbers of at least {self.least:g}: give some.", **{name: value}
            ) from None


@dataclass(frozen=True)
class Whole:
    """A whole number of at least ``least``."""

    least: int

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no whole number, or too small."""
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < self.least:
            raise OptionError(
                f"{{{name}}} is not a whole number of at least {self.least}: give one.", **{name: value}
            )


@dataclass(frozen=True)
class Duration:
    """A time, as a number of seconds or in words: 90s, 10min, 2h."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no time."""
        if not isinstance(value, str | Real) or seconds_of(value) is None:  # type: ignore[arg-type]
            raise OptionError(f"{{{name}}} is no time: write it like 90s, 10min or 2h.", **{name: value})


@dataclass(frozen=True)
class Regex:
    """A regular expression."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no regular expression."""
        try:
            re.compile(value)  # type: ignore[call-overload]
        except (re.error, TypeError) as error:
            said = str(error).replace("{", "{{").replace("}", "}}")
            raise OptionError(
                f"{{{name}}} is not a regular expression ({said}): mend it.", **{name: value}
            ) from None


@dataclass(frozen=True)
class ByteCount:
    """Bytes, as a number or in words: 4GB, 512MB."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no size."""
        if not isinstance(value, str | int) or not bytes_of(value):
            raise OptionError(f"{{{name}}} is no size: write it like 4GB or 512MB.", **{name: value})


@dataclass(frozen=True)
class Address:
    """The address of a server."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no address."""
        if not isinstance(value, str) or not value:
            raise OptionError(f"{{{name}}} is no address: give one like tcp://host:8786.", **{name: value})


@dataclass(frozen=True)
class FolderName:
    """The path of a folder."""

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is no path."""
        if not isinstance(value, str | Path) or not str(value):
            raise OptionError(f"{{{name}}} is no path: give that of a folder.", **{name: value})


@dataclass(frozen=True)
class Function:
    """A function, or one that is known by name; the command line writes FILE.py:FUNCTION."""

    known: str

    def check(self, name: str, value: object) -> None:
        """Raise OptionError for what is neither."""
        if value != self.known and not callable(value):
            raise OptionError(
                f"{{{name}}} is neither {self.known} nor a function: give one.", **{name: value}
            )
