"""Log lines: one a request, as text or JSON, on one line whatever a client sent.

Knows what may be logged of a request: never prompts, pictures or keys.
"""

import json
import logging
import sys
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TextIO

from sightline_server.errors import ApiError
from sightline_server.settings import Settings

log = logging.getLogger("sightline_server.access")

OWN_LOGGERS = ("sightline", "sightline_server", "sightline_models")

_MAX_PATH = 200
# Both C0 and C1 controls, delete, the two Unicode line ends and the marks that reorder text on a terminal.
_UNPRINTABLE = {
    code: f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


@dataclass
class RequestRecord:
    """What is known of one HTTP request by the time it ends. Filled in on the way."""

    request_id: str
    method: str
    path: str
    started: float
    """By ``time.perf_counter``."""
    endpoint: str = "other"
    status: int = 0
    """0: the client left before there was an answer."""
    outcome: str | None = None
    """How it ended where the status doesn't tell; see ``sightline_requests_total``."""
    fields: dict[str, str | int] = field(default_factory=dict)
    """What the endpoint adds to the line: counts of tokens and pictures, the finish reason, an error's code."""

    def fail(self, error: ApiError) -> None:
        """The answer is ``error``, whatever status was sent before it came up."""
        self.outcome = _outcome(error.status)
        self.fields["code"] = error.code or error.type

    def ended_as(self) -> str:
        return self.outcome or _outcome(self.status)


def _outcome(status: int) -> str:
    if status == 0:
        return "cancelled"
    if status == 503:
        return "overloaded"
    if status >= 500:
        return "failed"
    return "refused" if status >= 400 else "completed"


def log_request(record: RequestRecord, seconds: float) -> None:
    shown: dict[str, str | int | float] = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path[:_MAX_PATH],
        "status": record.status,
        "outcome": record.ended_as(),
        "ms": round(seconds * 1000, 1),
        **record.fields,
    }
    # A monitor that asks every second is not worth a line.
    level = logging.DEBUG if record.endpoint == "health" else logging.INFO
    log.log(level, " ".join(f"{name}={_quoted(value)}" for name, value in shown.items()), extra={"shown": shown})


def _quoted(value: str | int | float) -> str:
    """As it is, unless it could be taken for other fields of the line."""
    plain = str(value)
    return json.dumps(plain, ensure_ascii=False) if any(mark in plain for mark in ' "=') else plain


def frames(error: BaseException) -> str:
    """Where ``error`` was raised and of which type, without its text, which may quote what a user sent."""
    return "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send everything logged in this process to ``stream`` (standard error), formatted as the settings say.

    Libraries are heard from ``warning`` on: below that, some write whole URLs.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = logging.getLevelName(settings.log_level.upper())
    root.setLevel(max(level, logging.WARNING))
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level)


class TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return f"{time} {record.levelname:<7} {_escape(_message(self, record))}"


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        shown = getattr(record, "shown", None)
        line |= shown if isinstance(shown, dict) else {"message": _message(self, record)}
        return json.dumps(line)


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    return f"{message}\n{formatter.formatException(record.exc_info)}" if record.exc_info else message


def _escape(text: str) -> str:
    return text.translate(_UNPRINTABLE).encode("utf-8", "backslashreplace").decode()
