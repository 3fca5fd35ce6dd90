"""What a GPU run has to reach, row by row; the README's table has one for each. Measures nothing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    id: str
    what: str
    target: float
    unit: str
    better: Literal["more", "less"]


ROWS = (
    Row("decode_bf16_b1", "LLaVA-1.5-7B, bfloat16, one answer", 260, "tok/s", "more"),
    Row("decode_nf4_b1", "the same in NF4", 600, "tok/s", "more"),
    Row("ttft_idle", "first token of one picture over HTTP, nothing else running", 30, "ms", "less"),
)
