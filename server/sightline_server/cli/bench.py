"""`sightline bench`: load any OpenAI-compatible server and say how it held up.

Knows flags, the terminal and exit codes. A plain client of /v1: it needs no model, no GPU and no Sightline server.
"""

import argparse
import asyncio
import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sightline_server.bench.client import Record
from sightline_server.bench.http import Endpoint
from sightline_server.bench.load import (
    TYPICAL_TOKENS_PER_WORD,
    Arrivals,
    BenchError,
    Run,
    Target,
    find_model,
    measure_tokens_per_word,
    run_load,
    warm_up,
)
from sightline_server.bench.report import Summary, describe, summarize, times_table
from sightline_server.bench.workload import WorkloadSpec, make_bodies

DESCRIPTION = """\
Load an OpenAI-compatible server with streamed chat requests and print times and throughput. Answers are sampled and
run to --output-len whatever they say (ignore_eos), so that a model that repeats itself or stops early flatters nobody.
The last line of standard output is one JSON object.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    parser = subparsers.add_parser("bench", help="measure an OpenAI-compatible server", description=DESCRIPTION)
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:8000/v1", help="root of the API (default: %(default)s)")
    server.add_argument("--model", help="default: the first one the server lists")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="for one request (%(default)g)")
    load = parser.add_argument_group("load")
    load.add_argument("--num-prompts", type=_count, default=32, metavar="N", help="requests measured (%(default)s)")
    load.add_argument(
        "--max-concurrency", type=_count, metavar="N", help="most requests under way at once (default: all of them)"
    )
    load.add_argument(
        "--request-rate", type=_positive, metavar="R", help="requests a second, Poisson (default: no wait)"
    )
    load.add_argument("--warmup", type=_whole, default=1, metavar="N", help="requests sent before (%(default)s)")
    work = parser.add_argument_group("work")
    work.add_argument("--input-len", type=_count, default=64, metavar="N", help="text tokens asked (%(default)s)")
    work.add_argument("--output-len", type=_count, default=128, metavar="N", help="tokens answered (%(default)s)")
    work.add_argument(
        "--images",
        choices=("own", "same", "none"),
        default="own",
        help="a picture for each request, one for all, or none (%(default)s)",
    )
    work.add_argument("--image-size", type=_size, default=(336, 336), metavar="WxH", help="pixels (336x336)")
    work.add_argument("--image-format", choices=("jpeg", "png"), default="jpeg", help="(%(default)s)")
    work.add_argument("--temperature", type=_temperature, default=1.0, metavar="T", help="(%(default)g)")
    work.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for answers of full length; --no-ignore-eos for servers that refuse the field",
    )
    work.add_argument("--seed", type=_whole, metavar="N", help="repeats a workload (default: a fresh one, printed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and every request's record here")
    return parser


def run(args: argparse.Namespace) -> int:
    """0 when every request ended well, 1 when some failed or the run could not be made."""
    console, notes = Console(), Console(stderr=True)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            summary, records = runner.run(_measure(args, notes))
    except (BenchError, ValueError) as error:
        notes.print(f"[bold red]bench:[/] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        notes.print("bench: interrupted, nothing to report")
        return 130
    console.print(times_table(summary))
    for line in describe(summary):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if args.json is not None:
        document = {"summary": summary, "records": records}
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
    return 1 if summary.counts.failed else 0


async def _measure(args: argparse.Namespace, notes: Console) -> tuple[Summary, tuple[Record, ...]]:
    endpoint = Endpoint.parse(args.url)
    model = args.model or await find_model(endpoint, args.api_key)
    target = Target(endpoint=endpoint, model=model, api_key=args.api_key, timeout_s=args.timeout)
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    spec = WorkloadSpec(
        seed=seed,
        num_prompts=args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        images=args.images,
        image_size=args.image_size,
        image_format=args.image_format,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
    )
    counted = await measure_tokens_per_word(target, spec)
    if counted is None:
        notes.print(f"The server counts no prompt tokens: {TYPICAL_TOKENS_PER_WORD} a word are assumed.")
    bodies = list(
        make_bodies(spec, model=model, tokens_per_word=counted or TYPICAL_TOKENS_PER_WORD, warmup=args.warmup)
    )
    await warm_up(target, bodies[: args.warmup])
    arrivals = Arrivals(max_concurrency=args.max_concurrency or 0, request_rate=args.request_rate or 0.0, seed=seed)
    result = await _run_with_bar(target, bodies[args.warmup :], arrivals, notes)
    summary = summarize(
        result,
        url=args.url,
        model=model,
        seed=seed,
        caches=_caches(args),
        load={
            "num_prompts": args.num_prompts,
            "max_concurrency": arrivals.max_concurrency,
            "request_rate": arrivals.request_rate,
            "warmup": args.warmup,
        },
        workload=_workload(spec, counted),
        output_len=args.output_len,
    )
    return summary, result.records


async def _run_with_bar(target: Target, bodies: list[bytes], arrivals: Arrivals, notes: Console) -> Run:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Two frames a second: the bar is drawn on a thread of this process, beside the server it measures.
    with Progress(*columns, console=notes, refresh_per_second=2, disable=not notes.is_terminal) as progress:
        task = progress.add_task(f"{target.model} at {target.endpoint.authority}", total=len(bodies))
        return await run_load(target, bodies, arrivals, lambda _record: progress.advance(task))


def _caches(args: argparse.Namespace) -> str:
    kind = "cold" if args.images != "same" else "cold for the shared picture's first request, warm for the others"
    return kind if args.seed is None else f"{kind} unless the server has seen seed {args.seed} before"


def _workload(spec: WorkloadSpec, tokens_per_word: float | None) -> dict[str, str | float | int | bool]:
    told: dict[str, Any] = {
        "input_len": spec.input_len,
        "output_len": spec.output_len,
        "images": spec.images,
        "temperature": spec.temperature,
        "ignore_eos": spec.ignore_eos,
        "tokens_per_word": round(tokens_per_word or TYPICAL_TOKENS_PER_WORD, 3),
        "tokens_per_word_from": "assumed" if tokens_per_word is None else "usage",
    }
    if spec.images != "none":
        told["image_size"] = "{}x{}".format(*spec.image_size)
        told["image_format"] = spec.image_format
    return told


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _number(text: str, kind: type[int] | type[float], least: float, noun: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = least - 1
    if not value >= least:
        raise argparse.ArgumentTypeError(f"must be {noun}, not {text!r}")
    return value


def _count(text: str) -> int:
    return int(_number(text, int, 1, "a whole number of at least 1"))


def _whole(text: str) -> int:
    return int(_number(text, int, 0, "a whole number of at least 0"))


def _positive(text: str) -> float:
    return float(_number(text, float, 1e-9, "a number above 0"))


def _temperature(text: str) -> float:
    return float(_number(text, float, 0, "a number of at least 0"))


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not cross or not width.isdigit() or not height.isdigit() or not int(width) * int(height):
        raise argparse.ArgumentTypeError(f"must look like 336x336, not {text!r}")
    return int(width), int(height)
