"""What the comparison makes of its loads: ratios, noise, "=", tables, and when a run is worse than an earlier one."""

import json
import sys
from pathlib import Path

import pytest

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_results import document, load, model
from benchmarks import regression, tables
from benchmarks.figures import Gain, Spread, figures_of, gain, gains, loads_of, noise, number

QUIET = {"ours": {8: [100.0, 102.0]}, "ours-again": {8: [101.0, 100.0]}, "transformers": {8: [50.0, 40.0]}}


def test_gains_are_round_by_round_and_turned_so_that_more_is_better() -> None:
    loads = loads_of(model("demo", QUIET)["loads"])
    assert gains(loads, "transformers", 8, "tokens_per_s") == [2.0, 2.55]
    assert gains(loads, "transformers", 8, "ttft_p50_ms") == pytest.approx([2.0, 2.55])
    assert gains(loads, "transformers", 32, "tokens_per_s") == []
    assert gain(loads, "nobody", 8, "tokens_per_s") is None
    # Only rounds that both have are compared, whatever order they are written in.
    late = loads_of([load("transformers", 8, 1, 51.0), load("ours", 8, 1, 102.0), load("ours", 8, 0, 1.0)])
    assert gains(late, "transformers", 8, "tokens_per_s") == [2.0]


def test_noise_is_the_largest_factor_that_ours_differs_from_itself_by() -> None:
    loads = loads_of(model("demo", QUIET)["loads"])
    assert noise(loads, 8, "tokens_per_s") == pytest.approx(1.02)
    assert noise(loads, 8, "ttft_p50_ms") == pytest.approx(1.02)
    assert noise(loads_of([load("ours", 8, 0, 5.0)]), 8, "tokens_per_s") == 1.0


@pytest.mark.parametrize(
    ("ratio", "factor", "printed"),
    [
        (2.0, 1.05, "2.00x [1.90, 2.10]"),
        (1.04, 1.05, "="),
        (0.96, 1.05, "="),
        (0.9, 1.05, "0.90x [0.80, 1.00]"),
        (13.37, 1.3, "13.4x [13.3, 13.5]"),
        (2.0, 2.1, "="),
    ],
)
def test_a_ratio_inside_the_noise_is_printed_as_equal(ratio: float, factor: float, printed: str) -> None:
    assert str(Gain(Spread(ratio, ratio - 0.1, ratio + 0.1), factor)) == printed


def test_numbers_have_three_figures() -> None:
    assert [number(value) for value in (0.123, 1.234, 12.34, 123.4, 1234.5)] == ["0.12", "1.23", "12.3", "123", "1,234"]


def test_figures_come_from_the_load_generators_summary() -> None:
    times = {"p50": 5.0, "p99": 9.0}
    summary = {
        "throughput": {"output_tokens_per_s": 64.0},
        "tokens": {"output": 128},
        "ttft_ms": times,
        "itl_ms": None,
        "tpot_ms": times,
    }
    told = figures_of(summary, 4.0)
    assert told == {
        "tokens_per_s": 64.0,
        "tokens_per_cpu_s": 32.0,
        "ttft_p50_ms": 5.0,
        "ttft_p99_ms": 9.0,
        "tpot_p50_ms": 5.0,
        "tpot_p99_ms": 9.0,
    }
    assert "tokens_per_cpu_s" not in figures_of(summary, 0.0)


def test_the_overview_has_a_row_a_system_and_no_speed_for_one_that_failed() -> None:
    told = model("demo", {**QUIET, "ours-deterministic": {8: [99.0, 101.0]}}, failed=("ours-int8",))
    table = tables.overview(told)
    assert table.headings == ("demo: output tokens a second", "8 at once")
    assert table.rows == (
        ("Ours (bfloat16, 1 thread)", "101"),
        ("Transformers (bfloat16, 1 thread)", "45.0 (2.27x [2.00, 2.55])"),
        ("Ours-deterministic (bfloat16, 1 thread)", "100 (=)"),
        ("Ours-int8", "failed the gate"),
    )
    (details,) = tables.details(told)
    assert [row[1] for row in details.rows] == [
        "101 [100, 102]",
        "45.0 [40.0, 50.0]",
        "100 [99.0, 101]",
        "failed the gate",
    ]
    assert set(details.rows[-1][1:]) == {"failed the gate"}
    assert all(len(row) == len(details.headings) for row in details.rows)
    assert "FAILED: logits" in tables.gate_lines(told)[-1]
    assert tables.noise_line(told).endswith("by up to 2.0% at 8.")


def test_the_lines_beside_the_tables_name_caches_load_and_clocks() -> None:
    told = document(model("demo", QUIET))
    assert "fresh picture" in tables.workload_line(told).lower()
    told["workload"]["images"] = "same"
    assert "caches warm but for the first" in tables.workload_line(told)
    machine = tables.machine_line(told)
    for fact in ("abc+changes", "torch 2.15.0", "Load 0.5 before and 1.5 after", "0.90 times its speed before"):
        assert fact in machine
    assert any("= where" in line for line in tables.terminal(told))


def test_aligned_tables_are_columns() -> None:
    lines = tables.Table("t", ("", "ab"), (("row", "1"), ("longer row", "22"))).aligned()
    assert lines == ["t", "            ab", "row          1", "longer row  22"]


def with_peer(rate: float, again: float = 100.0) -> dict[str, object]:
    rates = {"ours": {8: [100.0]}, "ours-again": {8: [again]}, "ours-int8": {8: [150.0]}, "transformers": {8: [rate]}}
    return document(model("demo", rates))


def test_a_ratio_that_fell_by_more_than_allowed_is_a_regression_and_noise_is_none() -> None:
    before = with_peer(10.0)
    assert regression.regressions(before, with_peer(10.0)) == []
    assert regression.regressions(before, with_peer(11.7)) == []
    worse = regression.regressions(before, with_peer(12.5))
    assert len(worse) == 4, "two of our systems, two measures"
    assert "ours gives 8.00x what transformers does; it was 10.0x, and 8.50x" in worse[0]
    # The same fall in a run whose noise is larger.
    assert regression.regressions(before, with_peer(12.5, again=120.0)) == []
    assert regression.regressions(before, with_peer(5.0)) == [], "better is no regression"


def test_runs_that_share_nothing_are_not_compared() -> None:
    alone = document(model("demo", {"ours": {8: [100.0]}, "ours-again": {8: [100.0]}}))
    with pytest.raises(ValueError, match="share no peer"):
        regression.regressions(with_peer(10.0), alone)


def test_a_file_that_cant_be_compared_with_is_refused_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    with pytest.raises(ValueError, match="give a file that scripts/bench wrote"):
        regression.read(path)
    path.write_text(json.dumps({"suite": "cpu"}))
    with pytest.raises(ValueError, match="older bench"):
        regression.read(path)
    path.write_text(json.dumps(with_peer(10.0)))
    assert regression.read(path) == with_peer(10.0)
