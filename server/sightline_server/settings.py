"""The one table of settings: each row makes a flag, an environment variable and a row of `docs/settings.md`.

Nothing else in the project reads the environment. An unknown or bad value stops the start with a sentence naming it.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sightline_server.setting_rows import ENV_PREFIX, Row, SettingsError, rows_of
from sightline_server.setting_rows import row as _row

__all__ = ["ENV_PREFIX", "Row", "Settings", "SettingsError", "describe", "load", "replace", "rows"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    # Model
    model: str = _row("", "Checkpoint folder. Empty: the bundled demo model.", section="Model", metavar="DIR")
    random: str = _row(
        "",
        "Serve random weights of a named true shape, such as tiny or llava-1.5-7b, instead of a checkpoint.",
        section="Model",
        metavar="SHAPE",
    )
    random_seed: int = _row(0, "Seed of the random weights.", section="Model", minimum=0)
    served_model_name: tuple[str, ...] = _row(
        (), "Name(s) clients use; the first is the one reported. Default: the folder's name.", section="Model"
    )
    chat_template: str = _row(
        "", "Jinja chat template file to use instead of the checkpoint's.", section="Model", metavar="FILE"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _row(
        "auto",
        "Precision of weights and activations. auto: the checkpoint's on a GPU, float32 on a CPU.",
        section="Model",
    )
    quantize: Literal["none", "int8", "nf4"] = _row(
        "none",
        "Quantize the decoder's linear layers at load as bitsandbytes does, for less memory. On a CPU with VNNI int8 "
        "takes 0.9 to 1.7 times as long as none, nf4 two to three times. none: as the checkpoint is.",
        section="Model",
    )
    quantize_vision: bool = _row(
        False, "Quantize the vision tower and projector too; needs --quantize.", section="Model"
    )
    verify: bool = _row(
        False,
        "At the start, compare quantized weights with the unquantized ones on a few drawn pictures, and tell how far "
        "the answers are apart. Loads both, one after the other.",
        section="Model",
    )
    max_model_len: int = _row(
        0, "Longest prompt plus answer, in tokens. 0: what the checkpoint allows.", section="Model", minimum=0
    )

    # Engine
    device: str = _row(
        "auto", "auto, cpu, cuda or cuda:N; several GPUs as cuda:0,cuda:1, an engine for each.", section="Engine"
    )
    engines: int = _row(
        0,
        "Engines, each a process with weights and caches of its own, that requests are spread over. 0: one for each "
        "GPU that --device names, else one. On a CPU that holds the weights twice, 2 can answer more requests at once.",
        section="Engine",
        minimum=0,
        maximum=64,
    )
    threads: int = _row(
        0,
        "Most CPU threads for one engine step. 0: the cores this process may use, divided among the engines.",
        section="Engine",
        minimum=0,
    )
    block_size: int = _row(16, "Tokens a cache block holds.", section="Engine", minimum=1, maximum=256)
    max_step_tokens: int = _row(
        0, "Most tokens computed in one step. 0: 2048 on a GPU, 512 on a CPU.", section="Engine", minimum=0
    )
    mixed_step_tokens: int = _row(
        0,
        "Most prompt tokens in a step that also continues answers: fewer keep those even, more read prompts sooner. "
        "0: 512 on a GPU, on a CPU no other bound than --max-step-tokens.",
        section="Engine",
        minimum=0,
    )
    max_running: int = _row(256, "Most requests computed at once.", section="Engine", minimum=1)
    gpu_memory_utilization: float = _row(
        0.9,
        "Share of the GPU's memory to use for weights, activations and cache.",
        section="Engine",
        minimum=0.05,
        maximum=0.98,
    )
    gpu_memory: int = _row(
        0,
        "Most GPU memory for weights, activations and cache, instead of a share. Torch is held to it; what the driver "
        "takes for itself, some hundred MiB, comes on top.",
        section="Engine",
        minimum=2**26,
        metavar="SIZE",
        is_size=True,
    )
    cpu_cache_gb: float = _row(
        1.0,
        "Memory for the key/value cache on a CPU, in GiB; divided among the engines.",
        section="Engine",
        minimum=0.001,
    )
    encoder_cache_mb: float = _row(
        256.0, "Memory for encoded images kept for reuse, in MiB, of each engine.", section="Engine", minimum=0
    )
    prefix_caching: bool = _row(True, "Reuse cached keys and values of equal prompt beginnings.", section="Engine")
    kernels: Literal["auto", "reference", "fused"] = _row(
        "reference",
        "Kernels in plain torch (reference), fused for a GPU (fused), or fused wherever they can be (auto). Until the "
        "fused ones have been run on a GPU, scripts/gpu_check says whether yours takes them.",
        section="Engine",
    )
    overlap: bool = _row(True, "On a GPU, plan and launch a step while the one before it is running.", section="Engine")
    cuda_graphs: bool = _row(
        True,
        "On a GPU, replay image encoding and, where the kernels are fused, decode steps from CUDA graphs.",
        section="Engine",
    )
    compile: bool = _row(
        False,
        "On a CPU, make a program of the decode step at each start of the engine: small models answer one request some "
        "three times as fast, many at once less so. Needs a C++ compiler (g++) and about a minute; the weights must "
        "not be in NF4.",
        section="Engine",
    )
    deterministic: bool = _row(
        False, "Make a request's bytes independent of what else runs, at a cost in speed.", section="Engine"
    )

    step_timeout_s: float = _row(
        0.0,
        "Seconds after which a step counts as hung and the engine is restarted. 0: 120 on a GPU, 600 on a CPU.",
        section="Engine",
        minimum=0,
    )

    # HTTP
    host: str = _row("127.0.0.1", "Address to listen on.", section="HTTP")
    port: int = _row(8000, "Port to listen on. 0: any free one.", section="HTTP", minimum=0, maximum=65535)
    api_key: tuple[str, ...] = _row(
        (), "Key(s) clients must send. None: no key is needed.", section="HTTP", secret=True
    )
    api_key_file: str = _row("", "File with one key a line; # starts a comment.", section="HTTP", metavar="FILE")
    keys_file: str = _row(
        "",
        "File of keys with scopes and limits, as 'sightline keys' writes it; read again on SIGHUP.",
        section="HTTP",
        metavar="FILE",
    )
    share_caches: bool = _row(
        False,
        "Let requests with different keys share cached prompts and pictures: faster, but one key can tell by the clock "
        "what another has sent.",
        section="HTTP",
    )
    cors_origins: tuple[str, ...] = _row((), "Browser origins that may call the API.", section="HTTP")
    allowed_hosts: tuple[str, ...] = _row(
        (),
        "Names that may stand in the Host header beside the usual ones; *.example.com: any below it; *: any at all. "
        "Always allowed: IP addresses, localhost and this machine's name; where --host isn't loopback, also names "
        "without a dot and those under .local, .internal and .home.arpa.",
        section="HTTP",
    )
    keep_alive_s: int = _row(120, "Seconds an idle connection stays open.", section="HTTP", minimum=1)
    sse_keep_alive_s: float = _row(
        15.0, "Seconds of silence in a stream before a keep-alive line. 0: never.", section="HTTP", minimum=0
    )
    drain_timeout_s: float = _row(
        30.0, "Seconds that running requests get to finish after SIGTERM or Ctrl-C.", section="HTTP", minimum=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = _row(
        "info", "Least severe log line written.", section="HTTP"
    )
    log_format: Literal["text", "json"] = _row("text", "How log lines are written.", section="HTTP")

    # Limits
    max_connections: int = _row(
        2048, "Most open connections; more are refused with 503.", section="Limits", minimum=1, maximum=50_000
    )
    max_connections_per_address: int = _row(
        1024,
        "Most open connections from one address (IPv6: one /64). 0: no bound of its own, which is right behind a "
        "reverse proxy, whose address all have.",
        section="Limits",
        minimum=0,
    )
    max_header_kb: int = _row(
        32, "Largest URL and headers of a request, in KiB.", section="Limits", minimum=1, maximum=1024
    )
    header_timeout_s: float = _row(
        10.0,
        "Seconds the headers of a request may take to arrive, and a new connection to begin one.",
        section="Limits",
        minimum=0.1,
    )
    stall_timeout_s: float = _row(
        60.0,
        "Seconds an answer may wait for a client that reads too slowly before its connection is closed.",
        section="Limits",
        minimum=0.1,
    )
    max_bodies_mb: float = _row(
        1024.0,
        "Memory for the bodies of all requests that are being received or answered, in MiB; more get 503.",
        section="Limits",
        minimum=0.001,
    )
    max_queue: int = _row(256, "Most requests waiting for the engine; more get 503.", section="Limits", minimum=1)
    queue_timeout_s: float = _row(
        120.0,
        "Seconds a request may wait for its first token while others queue; then it gets 503. 0: for ever.",
        section="Limits",
        minimum=0,
    )
    restart_wait_s: float = _row(
        60.0,
        "Seconds that requests which had not begun wait for an engine that died to be back. 0: they end at once.",
        section="Limits",
        minimum=0,
    )
    max_body_mb: float = _row(64.0, "Largest request body, in MiB.", section="Limits", minimum=0.001)
    body_timeout_s: float = _row(60.0, "Seconds a request body may take to arrive.", section="Limits", minimum=0.1)
    refusal_delay_s: float = _row(
        0.25,
        "Seconds a refusal is held back when its address collects more than 16 a second. 0: never.",
        section="Limits",
        minimum=0,
        maximum=10,
    )
    max_images: int = _row(16, "Most images in one request.", section="Limits", minimum=0)
    max_image_mb: float = _row(20.0, "Largest encoded image, in MiB.", section="Limits", minimum=0.001)
    max_image_megapixels: float = _row(50.0, "Most megapixels in one image.", section="Limits", minimum=0.001)
    max_request_megapixels: float = _row(
        120.0, "Most megapixels in all images of one request.", section="Limits", minimum=0.001
    )
    max_choices: int = _row(16, "Largest n of one request.", section="Limits", minimum=1, maximum=128)

    # Image decoding
    decode_workers: int = _row(
        0, "Processes that decode images. 0: half the cores, at least one.", section="Image decoding", minimum=0
    )
    decode_timeout_s: float = _row(
        4.0,
        "Seconds of processor time one image may take to decode; by the clock, four times as many.",
        section="Image decoding",
        minimum=0.1,
    )
    decode_memory_mb: int = _row(
        2048, "Address space of one decode process, in MiB.", section="Image decoding", minimum=256
    )

    @property
    def devices(self) -> tuple[str, ...]:
        """What ``device`` names, at least one."""
        return tuple(name.strip() for name in self.device.split(","))


_LOCKS = frozenset({"api_key", "api_key_file", "keys_file"})


def rows() -> tuple[Row, ...]:
    """All settings, in the order of the table."""
    return rows_of(Settings)


def load(flags: Mapping[str, str | Sequence[str]], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from ``flags`` (name -> text; several texts for a repeated flag), then the environment, then defaults.

    Raises SettingsError for an unknown name or a value out of its range.
    """
    environ = os.environ if environ is None else environ
    table = {row.name: row for row in rows()}
    for name in flags:
        if name not in table:
            raise SettingsError(f"There is no setting {name!r}. Run 'sightline serve --help' for the list.")
    known = {row.env for row in table.values()}
    for variable in environ:
        if variable.startswith(ENV_PREFIX) and variable not in known:
            raise SettingsError(f"{variable} is no setting of Sightline. Run 'sightline serve --help' for the list.")
    values: dict[str, Any] = {}
    for row in table.values():
        if row.name in flags:
            given = flags[row.name]
            texts = [given] if isinstance(given, str) else list(given)
            parsed = [row.parse(text, row.flag) for text in texts]
            values[row.name] = tuple(v for part in parsed for v in part) if row.many else parsed[-1]
        elif environ.get(row.env):
            values[row.name] = row.parse(environ[row.env], row.env)
        if row.name in _LOCKS and (row.name in flags or row.env in environ) and not values.get(row.name):
            source = row.flag if row.name in flags else row.env
            raise SettingsError(f"{source} is empty, which would leave the server open. Give a value, or leave it out.")
    settings = Settings(**values)
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    if settings.model and settings.random:
        raise SettingsError("A model folder and --random exclude each other: give one.")
    if settings.quantize_vision and settings.quantize == "none":
        raise SettingsError("--quantize-vision needs a scheme: add --quantize int8 or --quantize nf4.")
    if settings.api_key_file and not Path(settings.api_key_file).is_file():
        raise SettingsError(f"--api-key-file {settings.api_key_file!r} is no readable file.")
    if settings.chat_template and not Path(settings.chat_template).is_file():
        raise SettingsError(f"--chat-template {settings.chat_template!r} is no readable file.")
    _check_devices(settings)
    if settings.gpu_memory and settings.device == "cpu":
        raise SettingsError("--gpu-memory is for a GPU: with --device cpu, --cpu-cache-gb sizes the cache.")
    if settings.gpu_memory and settings.gpu_memory_utilization != Settings.gpu_memory_utilization:
        raise SettingsError("--gpu-memory and --gpu-memory-utilization exclude each other: give one.")


def _check_devices(settings: Settings) -> None:
    named, asked = settings.devices, settings.device
    numbered = [name for name in named if name.startswith("cuda:") and name[5:].isdigit()]
    if len(numbered) < len(named) and asked not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"--device must be auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, not {asked!r}.")
    if len({int(name[5:]) for name in numbered}) < len(numbered):
        raise SettingsError(f"--device {asked} names a GPU twice: an engine needs one of its own.")
    if numbered and settings.engines not in (0, len(numbered)):
        raise SettingsError(
            f"--engines {settings.engines} and --device {asked} don't fit: name a GPU for each engine, such as "
            "--device cuda:0,cuda:1, and leave --engines out."
        )


def describe(settings: Settings) -> dict[str, Any]:
    """Every setting that differs from its default, secrets masked; for the start-up log."""
    shown = {}
    for row in rows():
        value = getattr(settings, row.name)
        if value != row.default:
            shown[row.name] = "***" if row.secret else value
    return shown


def replace(settings: Settings, **changes: Any) -> Settings:
    return dataclasses.replace(settings, **changes)
