"""What `sightline serve` tells the person who started it: progress while loading, and one block when ready.

Knows the terminal and the facts it is given. Starts nothing and asks nothing.
"""

import json
import sys
import textwrap
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sightline_server.cli.terminal import own_command, size
from sightline_server.cli.verified import lines_of
from sightline_server.engine.types import EngineInfo

KEY_VARIABLE = "SIGHTLINE_API_KEY"


class LoadingProgress:
    """Shows how far the engine's loading is, on standard error: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._told: tuple[str, int] | None = None

    def __enter__(self) -> "LoadingProgress":
        if self._console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting the engine", total=1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, stage: str, fraction: float) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage, completed=fraction)
            return
        quarter = int(fraction * 4)
        if self._told != (stage, quarter):
            self._told = stage, quarter
            share = f": {quarter * 25}%" if quarter else ""
            print(f"{stage}{share}", file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class ReadyServer:
    """The facts of the start-up block."""

    name: str
    architecture: str
    checkpoint_dtype: str
    asked_dtype: str
    """The setting: auto, or a precision by name."""
    tokens_per_image: int
    info: EngineInfo
    host: str
    port: int
    needs_key: bool

    def block(self) -> str:
        """Several lines of plain text, with examples that work as they are."""
        info = self.info
        model = f"{self.name} ({self.architecture}, {_count(info.parameters)} parameters, {size(info.weight_bytes)})"
        context = f"{info.max_model_len:,} tokens a request at most; a picture takes {self.tokens_per_image} of them"
        lines = [
            f"Sightline {version('sightline')} is ready.",
            "",
            f"  model      {model}",
            f"  device     {info.device}",
            f"  precision  {self._weights()}{info.dtype} ({self._why_this_dtype()})",
            *self._checked(),
            f"  cache      {info.kv_tokens:,} tokens for all requests together",
            f"  context    {context}",
            f"  address    {self.url}",
            f"  API key    {self._key_line()}",
            "",
            f"Talk to it in a terminal: {own_command()} chat --image picture.png",
            "",
            "Ask about a picture with curl:",
            "",
            self.curl_example(),
            "",
            "or with Python (pip install openai):",
            "",
            self.python_example(),
            "",
            "Ctrl-C ends the server once running requests are done.",
        ]
        return "\n".join(lines)

    @property
    def url(self) -> str:
        """Where a client on this machine finds the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    def curl_example(self) -> str:
        key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if self.needs_key else ""
        return textwrap.dedent(
            f"""\
            curl {self.url}/chat/completions -H "Content-Type: application/json"{key} -d @- <<JSON
            {{"model": {json.dumps(self.name)}, "messages": [{{"role": "user", "content": [
              {{"type": "image_url", "image_url": {{"url":
                "data:image/png;base64,$(base64 < picture.png | tr -d '\\n')"}}}},
              {{"type": "text", "text": "Describe the picture."}}]}}]}}
            JSON"""
        )

    def python_example(self) -> str:
        key = f'os.environ["{KEY_VARIABLE}"]' if self.needs_key else '"none"'
        return textwrap.dedent(
            f"""\
            import base64, {"os, " if self.needs_key else ""}pathlib
            from openai import OpenAI

            picture = base64.b64encode(pathlib.Path("picture.png").read_bytes()).decode()
            client = OpenAI(base_url={json.dumps(self.url)}, api_key={key})
            stream = client.chat.completions.create(
                model={json.dumps(self.name)},
                messages=[{{"role": "user", "content": [
                    {{"type": "image_url", "image_url": {{"url": "data:image/png;base64," + picture}}}},
                    {{"type": "text", "text": "Describe the picture."}}]}}],
                stream=True,
            )
            for chunk in stream:
                print(chunk.choices[0].delta.content or "", end="", flush=True)"""
        )

    def _why_this_dtype(self) -> str:
        if self.asked_dtype != "auto":
            return f"as --dtype {self.asked_dtype} asks"
        if not self.info.on_gpu:
            return f"auto on a CPU: holds the checkpoint's {self.checkpoint_dtype} exactly"
        if self.info.dtype == self.checkpoint_dtype:
            return "auto: the checkpoint's own"
        return f"auto: this GPU can't compute in the checkpoint's {self.checkpoint_dtype}"

    def _checked(self) -> list[str]:
        if self.info.verification is None:
            return []
        first, *rest = lines_of(self.info.verification)
        return [f"  checked    {first}", *(f"             {line}" for line in rest)]

    def _weights(self) -> str:
        kept = self.info.quantization
        return "" if kept == "none" else f"weights of linear layers {kept}, all else "

    def _key_line(self) -> str:
        if self.needs_key:
            return "needed, as 'Authorization: Bearer KEY'"
        if self.host in ("127.0.0.1", "::1", "localhost"):
            return "not needed"
        return "not needed: whoever reaches this address can use it; --api-key or --api-key-file changes that"


def _count(number: int) -> str:
    for power, unit in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return str(number)
