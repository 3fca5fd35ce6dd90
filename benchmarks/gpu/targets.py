"""What a GPU run is to show, row by row: what is measured, the target, and which way is better.

Knows ids and numbers, and imports nothing of ours: whoever writes a report reads it. How a row gets its value is
``verdicts.py``'s to know. A row without a target is told and not judged.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One claim, or one figure that stands beside the claims."""

    id: str
    what: str
    target: float | None
    unit: str
    better: Literal["more", "less"]

    def verdict(self, value: float | None) -> Literal["pass", "short", "not measured", "told"]:
        if value is None:
            return "not measured"
        if self.target is None:
            return "told"
        reached = value >= self.target if self.better == "more" else value <= self.target
        return "pass" if reached else "short"


ROWS: tuple[Row, ...] = (
    Row("gpu_tests_failed", "tests marked gpu that failed", 0, "tests", "less"),
    Row("kernels_off", "fused kernels farther from the truth than allowed", 0, "cases", "less"),
    Row("bf16_error", "bfloat16 error against the float32 oracle, over transformers' own", 1.0, "x", "less"),
    Row("float32_error", "float32 error against the float32 oracle", 1e-3, "relative", "less"),
    Row("not_fused", "operations of bf16, int8 and NF4 decoders that no fused kernel serves", 0, "operations", "less"),
    Row("graph_share", "decode steps of 64 streams that replayed a graph", 0.99, "share", "more"),
    Row("waits", "waits for all of the device's work, a decode step of 64 streams", 0, "a step", "less"),
    Row("idle_64", "time the GPU is idle at 64 streams", 0.05, "share", "less"),
    Row("bf16_1", "one bf16 stream at context 640, of the bandwidth floor", 0.80, "share", "more"),
    Row("int8_1", "one int8 stream at context 640, of the bandwidth floor", 0.70, "share", "more"),
    Row("nf4_1", "one NF4 stream at context 640, of the bandwidth floor", 0.55, "share", "more"),
    Row("bf16_64", "64 bf16 streams at context 640, of the bandwidth floor", 0.75, "share", "more"),
    Row("encoder", "picture encoder, of the measured bf16 matrix ceiling", 0.50, "share", "more"),
    Row("second_turn", "GPU time to the first token of a second turn on one picture", 6.0, "ms", "less"),
    Row("burst", "p99 of gaps between tokens over their median, 32 pictures into 32 streams", 2.5, "x", "less"),
    Row("over_compiled", "one stream over transformers with a static cache, compiled", 1.4, "x", "more"),
    Row("over_batch", "64 streams over transformers' generate in its best batch", 4.0, "x", "more"),
    Row("over_eager", "one stream over transformers' generate", None, "x", "more"),
    Row("rate_bf16_1", "one bf16 stream", None, "tokens/s", "more"),
    Row("rate_int8_1", "one int8 stream", None, "tokens/s", "more"),
    Row("rate_nf4_1", "one NF4 stream", None, "tokens/s", "more"),
    Row("rate_bf16_64", "64 bf16 streams", None, "tokens/s", "more"),
    Row("rate_int8_64", "64 int8 streams", None, "tokens/s", "more"),
    Row("rate_nf4_64", "64 NF4 streams", None, "tokens/s", "more"),
    Row("reference_1", "one bf16 stream with reference kernels, of the bandwidth floor", None, "share", "more"),
    Row("reference_64", "64 bf16 streams with reference kernels, of the bandwidth floor", None, "share", "more"),
    Row("bnb_int8", "bitsandbytes' int8 layers in our graph: its step over ours, one stream", None, "x", "more"),
    Row("bnb_nf4", "bitsandbytes' NF4 layers in our graph: its step over ours, one stream", None, "x", "more"),
    Row("torchao_int8", "one int8 stream over transformers with torchao's int8, compiled", None, "x", "more"),
    Row("torchao_int4", "one NF4 stream over transformers with torchao's int4, compiled", None, "x", "more"),
    Row("deterministic_8", "what --deterministic costs at 8 streams", None, "x slower", "less"),
    Row("deterministic_64", "what --deterministic costs at 64 streams", None, "x slower", "less"),
    Row("http_1", "over HTTP, a fresh picture a request, 1 at once", None, "tokens/s", "more"),
    Row("http_8", "over HTTP, a fresh picture a request, 8 at once", None, "tokens/s", "more"),
    Row("http_32", "over HTTP, a fresh picture a request, 32 at once", None, "tokens/s", "more"),
    Row("http_64", "over HTTP, a fresh picture a request, 64 at once", None, "tokens/s", "more"),
    Row("over_serve", "over HTTP, 8 at once: our rate over transformers serve's", None, "x", "more"),
)
