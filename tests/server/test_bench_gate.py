"""The gate before any speed: what fails it, and that whatever fails it gets no figure and fails the command."""

import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gate, reference, suite, systems, tables
from benchmarks.gate import Kind, Reference, Verdict
from benchmarks.servers import Server, ServerError
from benchmarks.systems import OUR_THREADS, Choice, System, Tried, choose

from sightline_models import tiny

STEPS = [{"text": "a", "margin": 3.0}, {"text": "a b", "margin": 0.01}, {"text": "a b c", "margin": 3.0}]


def logits(
    dtype: str = "float32", quantize: str = "none", *, error: float = 1e-5, loose: float = 1e-5
) -> dict[str, Any]:
    found = {"relative_l2": error, "max_abs": error, "rows": 5}
    return {
        "dtype": dtype,
        "quantize": quantize,
        "computes_in": dtype,
        "against_reference": found,
        "against_float32": {**found, "max_abs": loose},
    }


def reference_of(*rows: dict[str, Any], answers: int = 1) -> Reference:
    asked = [{"question": f"What is {index}?", "png": "", "steps": STEPS} for index in range(answers)]
    return gate.read_reference({"answers": asked, "logits": list(rows)})


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (logits(error=0.9e-4), True),
        (logits(error=1.1e-4), False),
        (logits("bfloat16", error=0.9e-2), True),
        (logits("bfloat16", error=1.1e-2), False),
        (logits("float32", "int8", error=0.9e-4), True),
        (logits("float32", "int8", error=1.1e-4), False),
        (logits("bfloat16", "int8", error=0.9e-2), True),
        (logits("bfloat16", "int8", error=1.1e-2), False),
        (logits(error=float("nan")), False),
    ],
)
def test_each_kind_of_arithmetic_has_its_bound(row: dict[str, Any], passed: bool) -> None:
    kind = Kind(row["dtype"], row["quantize"])
    verdict = gate.judge_logits(reference_of(row), kind)
    assert verdict.passed is passed
    assert "over 5 rows" in verdict.says


@pytest.mark.parametrize(
    ("text", "shared"),
    [("a b c", 3), (" a b c", 3), ("a b d", 2), ("a x", 1), ("x", 0), ("", 0), ("a b c d", 2), ("a b", 2)],
)
def test_answers_are_compared_token_by_token(text: str, shared: int) -> None:
    assert gate.shared_steps(STEPS, text) == shared


def test_a_token_that_ends_within_a_character_is_no_difference() -> None:
    steps = [
        {"text": "a\ufffd", "margin": 1.0},
        {"text": "a\u00e9", "margin": 1.0},
        {"text": "a\u00e9b", "margin": 1.0},
    ]
    assert gate.shared_steps(steps, "a\u00e9x") == 2


@pytest.mark.parametrize(
    ("text", "loose", "passed"),
    [
        ("a b c", 1e-5, True),
        # The second token was nearly another: only an arithmetic that errs by so much may choose it.
        ("a x", 1e-5, False),
        ("a x", 0.006, True),
        ("x", 0.006, False),
        ("a b x", 0.006, False),
    ],
)
def test_answers_may_part_at_near_ties_only(text: str, loose: float, passed: bool) -> None:
    verdict = gate.judge_answers(reference_of(logits(loose=loose)), Kind("float32"), [text])
    assert verdict.passed is passed
    if not passed:
        assert repr(text) in verdict.says
        assert "'What is 0?'" in verdict.says


def test_deterministic_means_the_same_bytes_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    server, seen = Server("s", "http://127.0.0.1:1/v1", "m", 0.0, Path(), 0), []

    def ask(_server: Server, question: str, _png: str, *, seed: int | None = None, **_fields: Any) -> str:
        seen.append(seed)
        if seed is None:
            return "a b c"
        return f"{question} {seed}" if seed != 3 or seen.count(3) == 1 else "other"

    monkeypatch.setattr(gate, "ask", ask)
    told = reference_of(logits(), answers=3)
    assert gate.judge_server(server, told, Kind("float32")) == Verdict(
        True, "greedy answers equal in 9 of 9 tokens, parting at near ties only"
    )
    verdict = gate.judge_server(server, told, Kind("float32"), deterministic=True)
    assert verdict == Verdict(False, "1 of 8 answers change with what else runs")


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_checkpoint(folder, preset="tiny", seed=1, dtype="bfloat16")
    return folder


KINDS = [("float32", "none"), ("bfloat16", "none"), ("float32", "int8")]


def test_the_reference_passes_ours_and_notices_a_wrong_constant(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = json.loads(json.dumps(reference.compare(tiny_checkpoint, KINDS)))
    found = gate.read_reference(told)
    for kind in KINDS:
        assert gate.judge_logits(found, Kind(*kind)).passed, told["logits"]
    assert found.logits[Kind("float32", "int8")]["against_float32"]["max_abs"] > 1e-3, "int8 rounds weights"
    for row in found.answers:
        assert Image.open(io.BytesIO(base64.b64decode(row["png"]))).size == (32, 32)
        assert row["steps"][-1]["text"]
    true_load = reference.load_ours

    def load_wrong(folder: Path, dtype: str, quantize: str) -> Any:
        model, torch_dtype = true_load(folder, dtype, quantize)
        model.get_buffer("pixel_mean_C").zero_()
        return model, torch_dtype

    monkeypatch.setattr(reference, "load_ours", load_wrong)
    wrong = gate.read_reference(reference.compare(tiny_checkpoint, KINDS))
    assert not any(gate.judge_logits(wrong, Kind(*kind)).passed for kind in KINDS)


def test_a_reference_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="nothing can be checked") as raised:
        gate.ask_reference(tmp_path, [Kind("float32")])
    assert "config.json" in str(raised.value)


def system(key: str = "ours", **changes: Any) -> System:
    @contextlib.contextmanager
    def start(setting: str, threads: str) -> Iterator[Server]:
        yield Server(f"{key}/{setting}/{threads}", "http://127.0.0.1:1/v1", "m", 0.0, Path(), 0)

    known: dict[str, Any] = {"settings": ("float32", "bfloat16"), "threads": ("default", "1"), "gated": True}
    return System(key, key, start, **{**known, **changes})


def test_the_fastest_that_passes_competes_and_a_failure_has_no_speed() -> None:
    rates = {"ours/float32/default": 5.0, "ours/bfloat16/default": 9.0, "ours/float32/1": 6.0}
    timed = []

    def check(_system: System, setting: str, _server: Server) -> Verdict:
        return Verdict(setting != "bfloat16", f"judged {setting}")

    def speed(_system: System, server: Server) -> float:
        timed.append(server.name)
        return rates[server.name]

    choice = choose(system(), check, speed)
    assert choice.best == Tried("float32", "1", 6.0, "judged float32", True)
    assert not choice.passed
    assert timed == ["ours/float32/default", "ours/float32/1"]
    assert Tried("bfloat16", "default", None, "judged bfloat16", False) in choice.tried
    hopeless = choose(system(settings=("bfloat16",)), check, speed)
    assert hopeless.best is None
    assert hopeless.to_json()["setting"] is None


def test_peers_are_not_gated_and_an_only_way_is_not_timed() -> None:
    def forbidden(*_arguments: Any) -> Any:
        raise AssertionError("a peer was judged, or an only way timed")

    only = choose(system("peer", settings=("auto",), threads=("default",), gated=False), forbidden, forbidden)
    assert only.best == Tried("auto", "default", None)
    peers = choose(system("peer", gated=False), forbidden, lambda _system, server: len(server.name))
    assert peers.best == Tried("bfloat16", "default", len("peer/bfloat16/default"))
    checked = choose(system(settings=("float32",), threads=("1",)), lambda *_: Verdict(True, "good"), forbidden)
    assert checked.best == Tried("float32", "1", None, "good", True)


def test_the_deterministic_row_differs_by_its_flag_alone() -> None:
    like = Tried("bfloat16", "1", 9.0)
    made = systems.ours_deterministic(Path("there"), [], like)
    assert (made.settings, made.threads, made.concurrencies) == (("bfloat16",), ("1",), (8,))
    assert Choice(made).best is None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of servers that would have been started."""
    commands: list[list[str]] = []

    @contextlib.contextmanager
    def running(_name: str, command: list[str], **_options: Any) -> Iterator[None]:
        commands.append(command)
        yield

    monkeypatch.setattr(systems, "running", running)
    return commands


@pytest.mark.parametrize(
    ("threads", "flags"),
    [("default", []), ("1", ["--threads", "1"]), (systems.TWO_ENGINES, ["--engines", "2"])],
)
def test_threads_and_engines_are_told_to_our_server(threads: str, flags: list[str], started: list[list[str]]) -> None:
    makers = (systems.ours, systems.ours_int8, systems.ours_compiled)
    for made in (make(Path("there"), []) for make in makers):
        assert threads in made.threads
        with made.start("bfloat16", threads):
            command = started.pop()
        told = command[command.index("bfloat16") + 1 :]
        assert told[: len(flags)] == flags
        assert ("--engines" in told) == (threads == systems.TWO_ENGINES)


def test_the_compiled_row_differs_by_its_flag_alone(started: list[list[str]]) -> None:
    made = systems.ours_compiled(Path("there"), ["--block-size", "8"])
    assert (made.settings, made.quantize, made.gated) == (systems.PRECISIONS, "none", True)
    with made.start("bfloat16", "default"):
        assert started[0][-3:] == ["--block-size", "8", "--compile"]


def test_a_row_says_what_its_server_was_started_with() -> None:
    told = {threads: tables.started_with({"setting": "bfloat16", "threads": threads}) for threads in OUR_THREADS}
    assert told == {"default": "bfloat16", "1": "bfloat16, 1 thread", "2 engines": "bfloat16, 2 engines"}
    assert tables.started_with({"setting": "auto", "threads": "4"}) == "the checkpoint's precision, 4 threads"


class FakeBench:
    """Stands for the load generator: every load has the figures of one round."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def __call__(self, server: Server, **flags: Any) -> dict[str, Any]:
        self.asked.append((server.name, flags["max_concurrency"], flags["output_len"]))
        times = {"p50": 1.0, "p99": 2.0}
        return {
            "counts": {"short": 0},
            "tokens": {"output": 128},
            "throughput": {"output_tokens_per_s": 100.0},
            "server_cpu_s": 1.0,
            "duration_s": 1.0,
            "seed": 1,
            "caches": "cold",
            "client_cpu_share": 0.1,
            **{f"{kind}_ms": times for kind in ("ttft", "itl", "tpot")},
        }


@pytest.fixture
def fake_world(monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    """The suite without processes: ours passes, int8 passes or fails by what a test sets."""
    bench = FakeBench()
    told = reference_of(
        *(logits(dtype, quantize) for dtype in ("float32", "bfloat16") for quantize in ("none", "int8"))
    )
    monkeypatch.setattr(suite, "bench", bench)
    monkeypatch.setattr(suite, "checkpoint", lambda _name: contextlib.nullcontext(Path()))
    monkeypatch.setattr(suite, "matmul_gflops", lambda: 100.0)
    monkeypatch.setattr(suite, "nvidia_smi", lambda: None)
    monkeypatch.setattr(gate, "ask_reference", lambda _folder, _kinds: told)
    monkeypatch.setattr(gate, "judge_server", lambda *_, **__: Verdict(True, "answers agree"))
    monkeypatch.setattr(suite, "ours", lambda *_: system("ours"))
    monkeypatch.setattr(suite, "ours_int8", lambda *_: system("ours-int8", quantize="int8"))
    monkeypatch.setattr(suite, "can_compile", lambda: True)
    monkeypatch.setattr(suite, "ours_compiled", lambda *_: system("ours-compiled"))
    monkeypatch.setattr(suite, "ours_compiled_int8", lambda *_: system("ours-compiled-int8"))
    monkeypatch.setattr(suite, "ours_defaults", lambda *_: system("ours-defaults", settings=("float32",)))
    only = {"settings": ("float32",), "threads": ("1",), "concurrencies": (8,), "deterministic": True}
    monkeypatch.setattr(suite, "ours_deterministic", lambda *_: system("ours-deterministic", **only))
    return bench


def run_suite(tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "cpu.json"
    code = suite.main(["--suite", "cpu", "--models", "demo", "--no-peer", "--json", str(path), *flags])
    return code, json.loads(path.read_text())


def test_rounds_run_in_opposite_order_and_ours_is_asked_twice(fake_world: FakeBench, tmp_path: Path) -> None:
    code, told = run_suite(tmp_path, "--rounds", "2")
    (model,) = told["models"]
    assert (code, model["passed"], told["format"]) == (0, True, 2)
    order = [(row["system"], row["round"]) for row in model["loads"] if row["concurrency"] == 8]
    first = [
        "ours",
        "ours-int8",
        "ours-compiled",
        "ours-compiled-int8",
        "ours-defaults",
        "ours-deterministic",
        "ours-again",
    ]
    assert order == [*((name, 0) for name in first), *((name, 1) for name in reversed(first))]
    assert {row["concurrency"] for row in model["loads"] if row["system"] == "ours-deterministic"} == {8}
    assert {row["concurrency"] for row in model["loads"] if row["system"] == "ours"} == {1, 8, 32}
    assert {"duration_s", "seed", "caches", "client_cpu_share", "load"} <= set(model["loads"][0])
    assert told["machine_after"]["matmul_gflops"] == told["machine"]["matmul_gflops"] == 100.0


def test_what_fails_the_gate_has_no_speed_and_fails_the_command(
    fake_world: FakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = reference_of(
        logits("float32"),
        logits("bfloat16"),
        logits("float32", "int8", error=1.0),
        logits("bfloat16", "int8", error=1.0),
    )
    monkeypatch.setattr(gate, "ask_reference", lambda _folder, _kinds: wrong)
    code, told = run_suite(tmp_path, "--rounds", "1")
    (model,) = told["models"]
    assert (code, model["passed"]) == (1, False)
    assert "ours-int8" not in {row["system"] for row in model["loads"]}
    assert not any(name.startswith("ours-int8") for name, _, _ in fake_world.asked), "it was measured all the same"
    said = capfd.readouterr().out
    assert "FAILED the gate, no speed: largest logit difference to float32 with the dequantized weights 1.0e+00" in said
    assert "failed the gate" in said


def test_nothing_is_compared_when_ours_fails(
    fake_world: FakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "judge_server", lambda *_, **__: Verdict(False, "to 'What?' it answers 'no', not 'yes'"))
    code, told = run_suite(tmp_path, "--rounds", "1")
    assert (code, told["models"][0]["loads"], fake_world.asked) == (1, [], [])
    assert "it answers 'no', not 'yes'" in capfd.readouterr().out


def test_against_an_earlier_run_without_peers_there_is_nothing_to_compare(
    fake_world: FakeBench, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, told = run_suite(tmp_path, "--rounds", "1")
    before = tmp_path / "before.json"
    before.write_text(json.dumps(told))
    code, _ = run_suite(tmp_path, "--rounds", "1", "--against", str(before))
    assert code == 1
    assert "share no peer" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "nope"], "name some of demo, llava-1.5-7b"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["--quick", "--full"], "not allowed with"),
        (["--against", "/nowhere.json"], "give a file that scripts/bench wrote"),
        (["--gguf", "a.gguf"], "--llama-server PATH --gguf FILE"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(flags: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(["--suite", "cpu", "--no-peer", *flags])
    assert ended.value.code == 2
    assert said in capfd.readouterr().err


def test_the_gpu_suite_is_the_gpu_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import main as gpu

    given = []

    def gpu_main(arguments: list[str]) -> int:
        given.append(arguments)
        return 7

    monkeypatch.setattr(gpu, "main", gpu_main)
    assert suite.main(["--suite", "gpu", "--full", "--stages", "decode", "--out", "there"]) == 7
    assert suite.main(["--suite=gpu", "--quick"]) == 7
    assert given == [["--stages", "decode", "--out", "there"], ["--quick"]]
