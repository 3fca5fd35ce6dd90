"""From records to figures: percentiles, throughput, error counts, a table and one JSON object.

Knows arithmetic and layout. Knows nothing of sockets or of how the load was driven. The metrics are defined as vLLM's
benchmark client defines them, so that figures of both can stand side by side.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
from rich.table import Table

from sightline_server.bench.load import Run

FORMAT_VERSION = 1
BUSY_CLIENT = 0.7
"""Share of one core from which the client may be what is measured."""


class Spread(msgspec.Struct):
    """How a quantity is distributed, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Throughput(msgspec.Struct):
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float


class Counts(msgspec.Struct):
    sent: int
    ok: int
    failed: int
    errors: dict[str, int]
    """Failures by name."""
    messages: dict[str, str]
    """One server's sentence for each name."""
    short: int
    """Requests that ended well but with fewer tokens than asked for."""


class Tokens(msgspec.Struct):
    """Sums over the requests that ended well."""

    prompt: int
    cached: int
    output: int
    output_from: str
    """``usage``, or ``chunks`` when the server reports no usage for some request."""


class Summary(msgspec.Struct, kw_only=True):
    """One run's figures; the last line ``sightline bench`` prints is this as JSON."""

    sightline_bench: int = FORMAT_VERSION
    url: str
    model: str
    seed: int
    caches: str
    load: dict[str, float | int]
    workload: dict[str, str | float | int | bool]
    duration_s: float
    counts: Counts
    tokens: Tokens
    throughput: Throughput
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    client_cpu_share: float
    """Of one core, while the load ran."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of ``ordered`` lies, interpolated linearly. ``ordered`` is ascending."""
    if not ordered:
        raise ValueError("A percentile of nothing was asked for.")
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(seconds: Iterable[float]) -> Spread | None:
    """The spread of ``seconds`` in milliseconds, nothing when there are none."""
    ordered = sorted(value * 1000 for value in seconds)
    if not ordered:
        return None
    p50, p90, p99 = (round(percentile(ordered, share), 3) for share in (0.5, 0.9, 0.99))
    return Spread(round(sum(ordered) / len(ordered), 3), p50, p90, p99, round(ordered[-1], 3))


def summarize(
    run: Run,
    *,
    url: str,
    model: str,
    seed: int,
    caches: str,
    load: dict[str, float | int],
    workload: dict[str, str | float | int | bool],
    output_len: int,
) -> Summary:
    """Failed requests count as failures and give no time and no token to any figure."""
    ok = [record for record in run.records if record.error is None]
    failed = [record for record in run.records if record.error is not None]
    tokens = Tokens(
        prompt=sum(record.prompt_tokens for record in ok),
        cached=sum(record.cached_tokens for record in ok),
        output=sum(record.output_tokens for record in ok),
        output_from="usage" if all(record.completion_tokens is not None for record in ok) else "chunks",
    )
    span = run.duration_s or math.inf
    return Summary(
        url=url,
        model=model,
        seed=seed,
        caches=caches,
        load=load,
        workload=workload,
        duration_s=round(run.duration_s, 4),
        counts=Counts(
            sent=len(run.records),
            ok=len(ok),
            failed=len(failed),
            errors=dict(Counter(record.error or "" for record in failed).most_common()),
            messages={record.error or "": record.message or "" for record in reversed(failed)},
            short=sum(record.output_tokens < output_len for record in ok),
        ),
        tokens=tokens,
        throughput=Throughput(
            requests_per_s=round(len(ok) / span, 3),
            output_tokens_per_s=round(tokens.output / span, 2),
            prompt_tokens_per_s=round(tokens.prompt / span, 2),
        ),
        ttft_ms=spread_ms(record.ttft_s for record in ok if record.ttft_s is not None),
        tpot_ms=spread_ms(record.tpot_s for record in ok if record.tpot_s is not None),
        itl_ms=spread_ms(gap for record in ok for gap in record.gaps_s),
        e2e_ms=spread_ms(record.e2e_s for record in ok),
        client_cpu_share=round(run.client_cpu_s / span, 4),
    )


def times_table(summary: Summary) -> Table:
    table = Table(title="Times in milliseconds", title_justify="left")
    for heading in ("", "mean", "p50", "p90", "p99", "max"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, spread in (
        ("time to first token", summary.ttft_ms),
        ("time per output token", summary.tpot_ms),
        ("between chunks", summary.itl_ms),
        ("end to end", summary.e2e_ms),
    ):
        if spread is None:
            table.add_row(label, *["-"] * 5)
        else:
            figures = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
            table.add_row(label, *(f"{figure:,.1f}" for figure in figures))
    return table


def describe(summary: Summary) -> list[str]:
    """The lines that stand beside the table."""
    counts, tokens, rates = summary.counts, summary.tokens, summary.throughput
    lines = [
        f"{counts.ok} of {counts.sent} requests ended well in {summary.duration_s:.2f} s "
        f"(seed {summary.seed}, caches {summary.caches})",
        f"{rates.output_tokens_per_s:,.1f} output tokens/s, {rates.requests_per_s:,.2f} requests/s, "
        f"{rates.prompt_tokens_per_s:,.1f} prompt tokens/s",
        f"{tokens.prompt:,} prompt tokens, {tokens.cached:,} of them cached; {tokens.output:,} output tokens, counted "
        + ("by the server's usage" if tokens.output_from == "usage" else "in chunks, as the server reports no usage"),
    ]
    for name, count in counts.errors.items():
        lines.append(f"FAILED {count} x {name}: {counts.messages[name]}")
    if counts.short:
        lines.append(f"{counts.short} answers are shorter than asked for: the rates above are of less work")
    share = f"This client used {summary.client_cpu_share:.0%} of one core"
    if summary.client_cpu_share > BUSY_CLIENT:
        share += ": it may be what was measured, so lower the load or give it a machine of its own"
    lines.append(share)
    return lines
