"""One row of the table of settings: how it is declared, named, and read from text.

Knows kinds of values and how people write them. Knows no setting.
"""

import re
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

ENV_PREFIX = "SIGHTLINE_"
LARGEST_NUMBER = 1e9
"""Where a row has no maximum of its own. No setting has a use for more, and what doesn't fit 64 bits can't be sent to
the engine."""

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([a-zA-Z]*)")
_LARGEST_SIZE = 2**50


class SettingsError(ValueError):
    """A setting that can't be used; the sentence names it and says what would do."""


def row(
    default: Any,
    help: str,
    *,
    section: str,
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    secret: bool = False,
    is_size: bool = False,
) -> Any:
    metadata = {
        "help": help,
        "section": section,
        "minimum": minimum,
        "maximum": maximum,
        "metavar": metavar,
        "secret": secret,
        "is_size": is_size,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Row:
    """One setting, as the command line, the environment and the docs see it."""

    name: str
    kind: type
    """bool, int, float or str: the type of one value."""
    many: bool
    choices: tuple[str, ...]
    default: Any
    help: str
    section: str
    metavar: str | None
    secret: bool
    is_size: bool
    """Bytes, written with a unit; 0 is none."""
    minimum: float | None
    maximum: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def parse(self, text: str, source: str) -> Any:
        """The value written in ``text``. Raises SettingsError naming ``source`` (a flag or a variable)."""
        if self.many:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if self.kind is bool:
            known = {
                "1": True,
                "true": True,
                "yes": True,
                "on": True,
                "0": False,
                "false": False,
                "no": False,
                "off": False,
            }
            if text.strip().lower() not in known:
                raise SettingsError(f"{source} must be true or false, not {text!r}.")
            return known[text.strip().lower()]
        if self.choices:
            if text not in self.choices:
                raise SettingsError(f"{source} must be one of {', '.join(self.choices)}, not {text!r}.")
            return text
        if self.kind is str:
            return text
        if self.is_size:
            return self._parse_size(text, source)
        try:
            number = self.kind(text)
        except ValueError:
            noun = "a whole number" if self.kind is int else "a number"
            raise SettingsError(f"{source} must be {noun}, not {text!r}.") from None
        if number != number or (self.minimum is not None and number < self.minimum):
            raise SettingsError(f"{source} must be at least {self.minimum:g}, not {text}.")
        maximum = LARGEST_NUMBER if self.maximum is None else self.maximum
        if number > maximum:
            raise SettingsError(f"{source} must be at most {maximum:g}, not {text}.")
        return number

    def _parse_size(self, text: str, source: str) -> int:
        if text.strip() in ("", "0"):
            return 0
        written = _SIZE.fullmatch(text.strip())
        factor = _UNITS.get(written[2].lower()) if written else None
        if written is None or factor is None:
            raise SettingsError(f"{source} must be a size such as 20GiB, 16000MB or a number of bytes, not {text!r}.")
        size = int(float(written[1]) * factor)
        least = int(self.minimum or 1)
        if size < least:
            raise SettingsError(f"{source} must be at least {least // 2**20}MiB, not {text!r}; 20GiB is a size.")
        if size > _LARGEST_SIZE:
            raise SettingsError(f"{source} is more than any machine has: {text!r}; 20GiB is a size.")
        return size


def rows_of(table: type) -> tuple[Row, ...]:
    """The rows of a dataclass whose fields are ``row``s, in their order."""
    hints = get_type_hints(table)
    made = []
    for entry in fields(table):
        assert entry.default is not MISSING
        hint, many, choices = hints[entry.name], False, ()
        if get_origin(hint) is tuple:
            hint, many = get_args(hint)[0], True
        elif get_origin(hint) is Literal:
            hint, choices = str, get_args(hint)
        made.append(
            Row(name=entry.name, kind=hint, many=many, choices=choices, default=entry.default, **entry.metadata)
        )
    return tuple(made)
