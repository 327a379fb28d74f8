"""Options in a file: TOML, with the names and values that a command line has.

model = "model.onnx"
calib = "calib.npz"
max-error = 0.02
forms = ["channel", "width"]
int8 = true
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

from onnx_lrsd.errors import LrsdError

Value = bool | int | float | str | list[bool | int | float | str]
"""What an option in a file may be."""


def read_config(path: Path, known: Collection[str]) -> dict[str, Value]:
    """The options in the file ``path``, by name.

    Raises LrsdError for a file that cannot be read, is not TOML, has a name that is not ``known``, or tables
    and dates, which no option takes.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LrsdError(f"There is no file {path}: check the path of --config.") from None
    except OSError as error:
        raise LrsdError(f"{path} cannot be read ({error.strerror}): check the path of --config.") from None
    except UnicodeDecodeError:
        raise LrsdError(f"{path} is not text: give a file that --print-config wrote.") from None
    except tomllib.TOMLDecodeError as error:
        raise LrsdError(f"{path} is not valid TOML ({error}): mend it there.") from None
    for name, value in found.items():
        if name not in known:
            raise LrsdError(f"{path} has no option's name in {name!r}: {_advice(name, known)}.")
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, bool | int | float | str):
                raise LrsdError(
                    f"{name} in {path} is no string, number, true or false, nor a list of them: write one."
                )
    return found


def write_config(options: Mapping[str, Value]) -> str:
    r"""The file that ``read_config`` reads ``options`` from.

    >>> write_config({"model": "net.onnx", "ratio": 2.0, "int8": True, "forms": ["channel", "width"]})
    'model = "net.onnx"\nratio = 2.0\nint8 = true\nforms = ["channel", "width"]'
    """
    return "\n".join(f"{name} = {_toml(value)}" for name, value in options.items())


def _advice(name: str, known: Collection[str]) -> str:
    if nearest := difflib.get_close_matches(name, known, n=1):
        return f"write {nearest[0]} if that is meant"
    return f"choose from {', '.join(known)}"


def _toml(value: Value) -> str:
    """A value as TOML writes it: as JSON does, but for DEL and for numbers that are not finite."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)
