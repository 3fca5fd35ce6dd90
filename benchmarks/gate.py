"""The gate before any speed: a variant that computes something else than the reference gets no figure.

Three parts: teacher-forced logits (``reference.py``, a process of its own), greedy answers over HTTP, and for
``--deterministic`` equal answers alone and in company. Knows bounds, answers and servers. Knows nothing of speed.
"""

import concurrent.futures
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, child_environment
from benchmarks.servers import Server, ServerError

MOST_FLOAT32_ERROR = 1e-4
"""Largest absolute difference of a logit in float32."""
MOST_BFLOAT16_ERROR = 1e-2
"""Relative L2 over all logits; transformers' own bfloat16 is between 0.4e-2 and 1.0e-2 on the two models."""
ANSWER_LEN = 32
COMPANY = 8
REFERENCE_TIMEOUT_S = 300


@dataclass(frozen=True)
class Verdict:
    """Whether a variant may be measured, and the sentence that says why or why not."""

    passed: bool
    says: str


@dataclass(frozen=True)
class Kind:
    """What decides a server's arithmetic, and so which logits stand for it."""

    dtype: str
    quantize: str = "none"


@dataclass(frozen=True)
class Reference:
    """What ``reference.py`` found for one model."""

    answers: Sequence[Mapping[str, Any]]
    """Each a ``question``, a ``png`` in base64 and ``steps``: the text so far and the best logit's lead."""
    logits: Mapping[Kind, Mapping[str, Any]]


def ask_reference(folder: Path, kinds: Iterable[Kind]) -> Reference:
    """Run the reference on the checkpoint in ``folder``. Raises ServerError with what it said when it fails."""
    with tempfile.TemporaryDirectory(prefix="sightline-gate-") as scratch:
        out = Path(scratch) / "reference.json"
        command = [sys.executable, "-m", "benchmarks.reference", "--model", str(folder), "--out", str(out)]
        for kind in kinds:
            command += ["--kind", f"{kind.dtype}/{kind.quantize}"]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=child_environment(),
                capture_output=True,
                text=True,
                timeout=REFERENCE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ServerError(f"The reference took more than {REFERENCE_TIMEOUT_S} s: try a smaller model.") from None
        if done.returncode:
            raise ServerError(f"The reference failed, so nothing can be checked.\n{done.stdout}{done.stderr}")
        return read_reference(json.loads(out.read_text()))


def read_reference(told: Mapping[str, Any]) -> Reference:
    return Reference(told["answers"], {Kind(row["dtype"], row["quantize"]): row for row in told["logits"]})


def judge_logits(reference: Reference, kind: Kind) -> Verdict:
    """The bound is that of the precision computed in; int8 is held to it against weights rounded to int8."""
    told = reference.logits[kind]
    found = told["against_reference"]
    if told["computes_in"] == "float32":
        bound, measure, name = MOST_FLOAT32_ERROR, "max_abs", "largest logit difference"
    else:
        bound, measure, name = MOST_BFLOAT16_ERROR, "relative_l2", "relative L2"
    name += " to float32" if kind.quantize == "none" else " to float32 with the dequantized weights"
    # Written so that NaN fails.
    passed = found[measure] <= bound
    sentence = f"{name} {found[measure]:.1e} over {found['rows']} rows, {bound:.1e} allowed"
    return Verdict(passed, sentence)


def judge_answers(reference: Reference, kind: Kind, given: Sequence[str]) -> Verdict:
    """Greedy answers equal the reference's up to the first position where its two best logits are nearer to each other
    than twice the largest error that the logits of this kind have."""
    near = 2 * reference.logits[kind]["against_float32"]["max_abs"]
    agreed = total = 0
    for expected, text in zip(reference.answers, given, strict=True):
        steps = expected["steps"]
        same = shared_steps(steps, text)
        agreed, total = agreed + same, total + len(steps)
        if same < len(steps) and not steps[same]["margin"] < near:
            return Verdict(
                False,
                f"to {expected['question']!r} it answers {text!r}, not {steps[-1]['text']!r}: they part at token "
                f"{same + 1}, where the reference's best logit leads by {steps[same]['margin']:.2g}",
            )
    return Verdict(True, f"greedy answers equal in {agreed} of {total} tokens, parting at near ties only")


def shared_steps(steps: Sequence[Mapping[str, Any]], text: str) -> int:
    """How many tokens of the reference's answer ``text`` begins with; all when they are equal."""
    if text.strip() == steps[-1]["text"].strip():
        return len(steps)
    for length, step in enumerate(steps):
        # A token may end within a character.
        if not text.strip().startswith(step["text"].rstrip("\ufffd").strip()):
            return length
    # The text goes on where the reference ends: they part at its end.
    return len(steps) - 1


def judge_server(server: Server, reference: Reference, kind: Kind, *, deterministic: bool = False) -> Verdict:
    """The parts that need the server running."""
    given = [ask(server, row["question"], row["png"]) for row in reference.answers]
    verdict = judge_answers(reference, kind, given)
    return judge_company(server, reference) if verdict.passed and deterministic else verdict


def judge_company(server: Server, reference: Reference) -> Verdict:
    """Whether sampled answers have the same bytes alone as beside ``COMPANY - 1`` others."""
    rows = [reference.answers[index % len(reference.answers)] for index in range(COMPANY)]

    def one(index: int) -> str:
        return ask(server, rows[index]["question"], rows[index]["png"], temperature=1.0, seed=index, ignore_eos=True)

    alone = [one(index) for index in range(COMPANY)]
    with concurrent.futures.ThreadPoolExecutor(COMPANY) as pool:
        together = list(pool.map(one, range(COMPANY)))
    changed = sum(first != second for first, second in zip(alone, together, strict=True))
    if changed:
        return Verdict(False, f"{changed} of {COMPANY} answers change with what else runs")
    return Verdict(True, f"greedy answers agree, and {COMPANY} sampled ones are the same bytes alone and in company")


def ask(server: Server, question: str, png: str, *, temperature: float = 0.0, **fields: Any) -> str:
    """One answer, not streamed. Raises ServerError with the server's sentence when it refuses."""
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
    body = {
        "model": server.model or first_model(server),
        "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
        "max_tokens": ANSWER_LEN,
        "temperature": temperature,
        **fields,
    }
    answer = _fetch(f"{server.url}/chat/completions", json.dumps(body).encode())
    return str(answer["choices"][0]["message"]["content"])


def first_model(server: Server) -> str:
    return str(_fetch(f"{server.url}/models")["data"][0]["id"])


def _fetch(url: str, body: bytes | None = None) -> Any:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from None
