"""Reads the JSON files of a checkpoint field by field, with errors that name file and field.

Knows types and ranges. Knows no meaning of any field; imports the standard library alone.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint folder that can't be served; the sentence names the file or field, and the fix."""


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
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {why}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}; fetch the file again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}")
        return cls(path, "", values)

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
        return CheckpointError(f"{self.where(name)} is {value!r}; it must be {wanted}")

    def integer(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        value = self._given(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._given(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, value, "a number")
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
