"""Reads the JSON files of a checkpoint field by field, with errors that name file and field.

Knows types and ranges. Knows no meaning of any field; imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline_models.checkpoint_folder import CheckpointError as CheckpointError
from sightline_models.checkpoint_folder import find_file, read_settings

# What any length or count of a tensor may be; far beyond what is served, and no overflow anywhere.
_MOST = 2**31 - 1
# Characters of a value that an error repeats.
_MAX_SHOWN = 200


@dataclass(frozen=True)
class Fields:
    """A JSON object, and where it stands.

    The typed readers count null as left out, and raise CheckpointError for a value they can't take.
    """

    file: Path
    prefix: str
    values: Mapping[str, Any]

    @classmethod
    def of_file(cls, path: Path, why: str) -> "Fields":
        if find_file(path.parent, path.name) is None:
            raise CheckpointError(f"{path} is missing: {why}")
        return cls(path, "", read_settings(path))

    def section(self, name: str, default: Mapping[str, Any] | None = None) -> "Fields":
        values = self.values.get(name)
        if values is None:
            values = default or {}
        if not isinstance(values, Mapping):
            raise self.error(name, values, "an object")
        return Fields(self.file, f"{self.prefix}{name}.", values)

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def where(self, name: str) -> str:
        return f"{self.file}: {self.prefix}{name}"

    def error(self, name: str, value: Any, wanted: str) -> CheckpointError:
        shown = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number of many digits"
        return CheckpointError(f"{self.where(name)} is {shown[:_MAX_SHOWN]}; it must be {wanted}")

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        value = self._given(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(name, value, f"a whole number of at least {least}")
        if value > most:
            raise self.error(name, value, f"a whole number of at most {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._given(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, value, "a number")
        # Half the exponents of a float: no power or product of two of them overflows.
        if not abs(value) < 1e150:
            raise self.error(name, value, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def choice(self, name: str, default: Any, choices: tuple[Any, ...]) -> Any:
        value = self._given(name, default)
        if value not in choices:
            raise self.error(name, value, f"{', '.join(map(str, choices))} for this release")
        return value

    def _given(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
