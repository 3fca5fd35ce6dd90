"""From the stages' result files to a value for every row of ``targets.py``, the file of verdicts and its table.

Knows what the stages write. Runs nothing: the files of earlier commands count as much as those of the last one, and
what no file tells is not measured, with the reason that is known.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.targets import ROWS

Results = Mapping[str, Any]
"""What one stage wrote."""


class NotMeasured(Exception):
    """A row has no value; the sentence says why."""


@dataclass(frozen=True)
class Figure:
    """A row's value, nothing where there is none, and what to know about it."""

    value: float | None
    note: str


class Folder:
    """The result files of all stages, of whichever command.

    What was run on a CPU or in a small shape proves the code and says nothing of a target: it isn't read, unless
    ``proofs`` are to count, as for a test of the reading.
    """

    def __init__(self, results: Mapping[str, Results], *, proofs: bool = False) -> None:
        self._results = results
        self._proofs = proofs

    @classmethod
    def read(cls, out: Path, stages: Iterable[str]) -> "Folder":
        paths = {name: out / f"{name}.json" for name in stages}
        return cls({name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()})

    def stage(self, name: str) -> Results:
        """What the stage wrote, however far it came. Raises NotMeasured when that is nothing."""
        if name not in self._results:
            raise NotMeasured(f"stage {name} was not run")
        results = self._results[name]
        if not self._proofs and (results.get("device") == "cpu" or results.get("quick")):
            raise NotMeasured(f"stage {name} ran on a CPU or a small shape, which proves the code alone")
        return results

    def get(self, name: str, *path: str) -> Any:
        """A value of a stage's results. Raises NotMeasured, with what the stage said, when it isn't there."""
        found: Any = self.stage(name)
        for key in path:
            if not isinstance(found, Mapping) or key not in found:
                raise NotMeasured(self.why(name))
            found = found[key]
        return found

    def row(self, name: str, table: str, **wanted: Any) -> Results:
        """The row of a stage's table with these values. Raises NotMeasured when there is none, or it failed."""
        for row in self.get(name, table):
            if all(row.get(key) == value for key, value in wanted.items()):
                for problem in ("failed", "skipped"):
                    if problem in row:
                        raise NotMeasured(f"stage {name}: {row[problem]}")
                found: Results = row
                return found
        raise NotMeasured(self.why(name))

    def why(self, name: str) -> str:
        results = self.stage(name)
        return f"stage {name}: {results.get('skipped') or results.get('failed') or 'it has no such figure'}"


def engine_row(folder: Folder, stage: str, streams: int) -> Results:
    """The engine's row as a server runs it: nothing slower stands in for it."""
    return folder.row(stage, "engine", streams=streams, fast=True)


def _tests(folder: Folder) -> Figure:
    told = folder.stage("tests")
    if (counts := told.get("counts")) is not None:
        if counts["tests"] == counts["skipped"]:
            raise NotMeasured(f"of {counts['tests']} tests none ran")
        wrong, note = counts["failures"] + counts["errors"], f"{counts['tests']} tests, {counts['skipped']} skipped"
        return Figure(wrong, note)
    so_far = told.get("so_far", {})
    wrong = so_far.get("failed", 0) + so_far.get("error", 0)
    if not wrong:
        raise NotMeasured(f"{folder.why('tests')}; {so_far.get('passed', 0)} tests had passed, none failed")
    return Figure(wrong, f"before the stage was cut short, {so_far.get('passed', 0)} passed")


def _kernels(folder: Folder) -> Figure:
    trials = folder.get("kernels", "trials")
    wrong = [f"{trial['operation']} in {trial['dtype']}" for trial in trials if not trial["passed"]]
    if not wrong and "finished_trials" not in folder.stage("kernels"):
        raise NotMeasured(folder.why("kernels"))
    return Figure(len(wrong), f"of {len(trials)} cases" + (f": {', '.join(sorted(set(wrong)))}" if wrong else ""))


def _oracle(key: str) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        compared = folder.get("oracle", "shapes")[-1]
        if key == "float32":
            return Figure(compared["ours_float32"]["relative_l2"], compared["shape"])
        ours, theirs = compared["ours_bfloat16"]["relative_l2"], compared["transformers_bfloat16"]["relative_l2"]
        note = f"{compared['shape']}: {ours:.2e}, transformers' {theirs:.2e}"
        if (reference := compared.get("ours_bfloat16_reference")) is not None:
            note += f"; with reference kernels {reference['relative_l2']:.2e}"
        return Figure(compared["over_reference"], note)

    return read


def _not_fused(folder: Folder) -> Figure:
    """Of the three precisions; one that wasn't measured leaves the whole unsaid."""
    refused = {
        f"{stage} {operation}": reason
        for stage in ("decode", "decode-int8", "decode-nf4")
        for operation, reason in folder.get(stage, "not_fused").items()
    }
    return Figure(len(refused), "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3]))


def _graph_share(folder: Folder) -> Figure:
    row = engine_row(folder, "decode", 64)
    return Figure(row["graph_share"], "the engine's own count; the trace of stage profile has its graph launches")


def _waits(folder: Folder) -> Figure:
    told = _profiled(folder)
    return Figure(told["waits"], f"and {told['event_waits']:g} for the results of the step before")


def _idle(folder: Folder) -> Figure:
    _profiled(folder)
    window = folder.get("profile", "window")
    if not window:
        raise NotMeasured("the trace holds no work of the device")
    note = f"of {window['steps']} traced steps; {window['idle_share_in_long_gaps']:.1%} in gaps over 10 us"
    # Beside what tracing may have added: an untraced step, less the bare one that nothing holds up. It doesn't sample.
    with contextlib.suppress(NotMeasured):
        bare = folder.row("decode", "batches", batch=64).get("in_graph", {})
        if "median_ms" in bare:
            left = 1 - bare["median_ms"] / engine_row(folder, "decode", 64)["step_ms"]
            note += f"; without a trace, at most {max(0.0, left):.1%}, sampling included"
    return Figure(window["idle_share"], note)


def _profiled(folder: Folder) -> Results:
    told: Results = folder.get("profile", "median")
    if folder.get("profile", "batch") != 64 or not told.get("kernels"):
        raise NotMeasured("no device was traced at 64 streams")
    return told


def _share(stage: str, streams: int, fast: bool = True) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        row = folder.row(stage, "engine", streams=streams, fast=fast)
        # Of two measurements of the ceiling the higher one counts.
        before = folder.get(stage, "copy_bytes_per_s")
        after = folder.stage(stage).get("copy_bytes_per_s_after", before)
        share = row["share_of_floor"] * min(1.0, before / after)
        note = f"{row['step_ms']:.2f} ms a step of the engine at {max(before, after) / 1e12:.2f} TB/s"
        bare = [each for each in folder.stage(stage).get("batches", ()) if each["batch"] == streams]
        if bare and "share_of_floor" in bare[0].get("in_graph", {}):
            note += f"; the bare step from a graph {bare[0]['in_graph']['share_of_floor']:.1%}"
        return Figure(share, note)

    return read


def _rate(stage: str, streams: int) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        row = engine_row(folder, stage, streams)
        spread = row["round_ms"]
        return Figure(row["tokens_per_s"], f"rounds of {min(spread):.3f} to {max(spread):.3f} ms a step")

    return read


def _encoder(folder: Folder) -> Figure:
    rows = folder.get("pictures", "encoder")
    best = max(rows, key=lambda row: row["share_of_ceiling"])
    return Figure(best["share_of_ceiling"], f"{best['pictures']} at once, {best['pictures_per_s']:,.0f} pictures/s")


def _second_turn(folder: Folder) -> Figure:
    turn = folder.get("pictures", "second_turn")
    cached = folder.get("pictures", "turns")[-1]
    note = f"by the device's clock; {cached['cached_tokens']} of {cached['prompt_tokens']} tokens cached"
    if (busy := folder.stage("pictures").get("second_turn_busy_ms")) is not None:
        note += f"; {busy:.1f} ms of it the device works"
    return Figure(turn["device_ms"], f"{note}; a first turn takes {turn['first_ms']:.1f} ms")


def _burst(folder: Folder) -> Figure:
    told = folder.get("pictures", "burst")
    note = f"p50 {told['p50_ms']:.1f} ms, p99 {told['p99_ms']:.1f} ms, all answered after {told['burst_ms']:.0f} ms"
    if (whole := folder.stage("pictures").get("burst_whole_steps")) is not None:
        ratio, spent = whole["p99_over_p50"], whole["burst_ms"]
        note += f"; with --mixed-step-tokens {whole['mixed_step_tokens']} {ratio:.2f}x and {spent:.0f} ms"
    return Figure(told["p99_over_p50"], note)


def _over_peer(stage: str, peer: str, what: str) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        ours, theirs = engine_row(folder, stage, 1)["tokens_per_s"], folder.get(peer, "tokens_per_s")
        return Figure(ours / theirs, f"{ours:,.0f} and {theirs:,.0f} tokens/s; {what}")

    return read


def _over_generate(streams: int) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        rows = [row for row in folder.get("peer-eager", "generate") if "tokens_per_s" in row]
        rows = [row for row in rows if (row["batch"] == 1) == (streams == 1)]
        if not rows:
            raise NotMeasured(folder.why("peer-eager"))
        best = max(rows, key=lambda row: row["tokens_per_s"])
        ours = engine_row(folder, "decode", streams)["tokens_per_s"]
        tried = ", ".join(str(row["batch"]) for row in rows)
        note = (
            f"{ours:,.0f} and {best['tokens_per_s']:,.0f} tokens/s of decoding alone; batch {best['batch']} of {tried}"
        )
        return Figure(ours / best["tokens_per_s"], note)

    return read


def _bitsandbytes(quantization: str) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        # A scheme that failed has one row for all batches.
        folder.row("bitsandbytes", "rows", quantization=quantization)
        row = folder.row("bitsandbytes", "rows", quantization=quantization, batch=1)
        how = "from graphs" if row["in_graph"] else f"launch by launch, {row.get('not_captured', 'on a CPU')}"
        note = f"{row['theirs_ms']:.2f} and {row['ours_ms']:.2f} ms a step {how}"
        return Figure(row["theirs_over_ours"], note)

    return read


def _deterministic(streams: int) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        price = folder.get("deterministic", "prices", str(streams))
        return Figure(price, f"decoding at context {folder.get('deterministic', 'context')}")

    return read


def _http(concurrency: int) -> Callable[[Folder], Figure]:
    def read(folder: Folder) -> Figure:
        run = folder.row("load", "runs", concurrency=concurrency)
        note = f"--kernels {folder.get('load', 'kernels')}; first token p50 {run['ttft_ms']['p50']:,.0f} ms"
        return Figure(run["throughput"]["output_tokens_per_s"], note)

    return read


def _over_serve(folder: Folder) -> Figure:
    ours = _http(8)(folder).value
    theirs = folder.get("serve", "run", "throughput", "output_tokens_per_s")
    assert ours is not None, "a measured rate is none"
    return Figure(ours / theirs, f"{ours:,.0f} and {theirs:,.0f} tokens/s")


READERS: Mapping[str, Callable[[Folder], Figure]] = {
    "gpu_tests_failed": _tests,
    "kernels_off": _kernels,
    "bf16_error": _oracle("bfloat16"),
    "float32_error": _oracle("float32"),
    "not_fused": _not_fused,
    "graph_share": _graph_share,
    "waits": _waits,
    "idle_64": _idle,
    "bf16_1": _share("decode", 1),
    "int8_1": _share("decode-int8", 1),
    "nf4_1": _share("decode-nf4", 1),
    "bf16_64": _share("decode", 64),
    "encoder": _encoder,
    "second_turn": _second_turn,
    "burst": _burst,
    "over_compiled": _over_peer("decode", "peer-compiled", "StaticCache, reduce-overhead"),
    "over_batch": _over_generate(64),
    "over_eager": _over_generate(1),
    "rate_bf16_1": _rate("decode", 1),
    "rate_int8_1": _rate("decode-int8", 1),
    "rate_nf4_1": _rate("decode-nf4", 1),
    "rate_bf16_64": _rate("decode", 64),
    "rate_int8_64": _rate("decode-int8", 64),
    "rate_nf4_64": _rate("decode-nf4", 64),
    "reference_1": _share("decode-reference", 1, fast=False),
    "reference_64": _share("decode-reference", 64, fast=False),
    "bnb_int8": _bitsandbytes("int8"),
    "bnb_nf4": _bitsandbytes("nf4"),
    "torchao_int8": _over_peer("decode-int8", "peer-int8wo", "int8 of both"),
    "torchao_int4": _over_peer("decode-nf4", "peer-int4wo", "4.5 bits a weight of ours, 4.25 of theirs"),
    "deterministic_8": _deterministic(8),
    "deterministic_64": _deterministic(64),
    "http_1": _http(1),
    "http_8": _http(8),
    "http_32": _http(32),
    "http_64": _http(64),
    "over_serve": _over_serve,
}


def read_figures(folder: Folder) -> dict[str, Figure]:
    """A figure for every row, in their order."""
    figures = {}
    for row in ROWS:
        try:
            figures[row.id] = READERS[row.id](folder)
        except NotMeasured as reason:
            figures[row.id] = Figure(None, str(reason))
    return figures


def write_verdicts(out: Path, machine: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    rows = {name: {"value": figure.value, "note": figure.note} for name, figure in figures.items()}
    (out / "verdicts.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def table(figures: Mapping[str, Figure]) -> list[str]:
    """A line a row: verdict, what, value, target, note."""
    lines = []
    for row in ROWS:
        figure = figures[row.id]
        value = "-" if figure.value is None else f"{figure.value:,.4g}"
        target = "" if row.target is None else f"{'>=' if row.better == 'more' else '<='} {row.target:g}"
        lines.append(
            f"{row.verdict(figure.value):<12} {row.id:<18} {value:>10} {row.unit:<10} {target:<9} {row.what}"
            + (f" ({figure.note})" if figure.note else "")
        )
    return lines
