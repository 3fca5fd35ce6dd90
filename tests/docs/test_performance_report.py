"""What the pages say of speed comes from the result files: written between markers, stale when these differ."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

# The tools are no package: scripts start them from the checkout, and so does this test.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_results import document, model
from benchmarks import chart, report
from benchmarks.gpu.targets import ROWS, Row

from sightline_models.config import read_config
from sightline_models.presets import write_preset
from sightline_server.cli.fit import Memory, plan
from sightline_server.settings import Settings

GIB = 2**30
SVG = "{http://www.w3.org/2000/svg}"
RATES = {
    "ours": {1: [50.0, 52.0], 8: [300.0, 310.0], 32: [900.0, 1000.0]},
    "ours-again": {1: [50.0, 51.0], 8: [301.0, 309.0], 32: [910.0, 990.0]},
    "ours-deterministic": {8: [100.0, 101.0]},
    "transformers": {1: [40.0, 41.0], 8: [42.0, 43.0], 32: [44.0, 45.0]},
    "transformers-defaults": {1: [20.0, 21.0], 8: [22.0, 23.0]},
    "llama-model-Q8_0": {1: [60.0, 61.0]},
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout with pages and one result."""
    page = f"# Page\n\nBefore.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n"
    for path in (report.README, report.PAGE):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(page)
    (tmp_path / report.RESULTS).mkdir(parents=True)
    write(tmp_path, "cpu-2026-11-21.json", document(model("demo", RATES), model("llava-45m", RATES)))
    return tmp_path


def write(tree: Path, name: str, content: object) -> None:
    path = tree / report.RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_pages_are_written_once_and_stale_when_a_result_or_a_page_changes(
    tree: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    everything = [report.README, report.PAGE, report.CHART]
    assert report.stale(tree) == everything
    assert report.main(["--root", str(tree)]) == 0
    assert report.stale(tree) == []
    text = (tree / report.README).read_text()
    assert text.startswith("# Page\n\nBefore.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "| Transformers (bfloat16, 1 thread) | 40.5 (1.26x [1.25, 1.27]) | 42.5 (7.18x [7.14, 7.21]) |" in text
    (tree / report.PAGE).write_text((tree / report.PAGE).read_text().replace("40.5", "4.05"))
    assert report.stale(tree) == [report.PAGE]
    report.main(["--root", str(tree)])
    write(tree, "cpu-2026-11-22.json", document(model("demo", RATES), date="2026-11-22"))
    assert report.stale(tree) == everything
    (tree / report.CHART).unlink()
    assert report.CHART in report.stale(tree)
    capfd.readouterr()


def test_the_newest_full_result_is_read_and_older_formats_are_not(tree: Path) -> None:
    write(tree, "cpu-quick-2026-11-30.json", document(model("demo", RATES), size="quick", date="2026-11-30"))
    write(tree, "cpu-2026-12-24.json", {"suite": "cpu", "machine": {"date": "2026-12-24"}})
    found = report.newest_cpu(tree)
    assert found is not None
    assert found[0] == "cpu-2026-11-21.json"
    (tree / report.RESULTS / "cpu-2026-11-21.json").unlink()
    found = report.newest_cpu(tree)
    assert found is not None
    assert found[0] == "cpu-quick-2026-11-30.json"


def test_without_results_the_pages_say_so(tree: Path) -> None:
    shutil.rmtree(tree / report.RESULTS)
    wanted = report.pages(tree)
    assert set(wanted) == {report.README, report.PAGE}
    with_target = sum(row.target is not None for row in ROWS)
    for path, rows in ((report.README, with_target), (report.PAGE, len(ROWS))):
        assert report.NOTHING in wanted[path]
        assert wanted[path].count("| not measured |") == rows > 0


def test_gpu_rows_have_their_figure_their_note_or_not_measured(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Row("fast", "fast one", 100, "tok/s", "more"),
        Row("slow", "slow one", 10, "ms", "less"),
        Row("gone", "gone one", 0, "tests", "less"),
        Row("new", "new one", 0.8, "share", "more"),
        Row("told", "told one", None, "x slower", "less"),
    )
    monkeypatch.setattr(report, "ROWS", rows)
    told = {
        "fast": {"value": 123.4, "note": ""},
        "slow": {"value": 12.0, "note": "graphs off"},
        "gone": {"value": None, "note": "no peer"},
        "told": {"value": 2.5, "note": ""},
    }
    write(tree, "gpu-old-2026-11-20/verdicts.json", {"machine": {}, "rows": {}})
    write(tree, "gpu-a-card-2026-11-21/verdicts.json", {"machine": {}, "rows": told})
    wanted = report.pages(tree)
    assert "| on a GPU ([gpu-a-card-2026-11-21](benchmarks/results/gpu-a-card-2026-11-21)) |" in wanted[report.README]
    assert "](../benchmarks/results/gpu-a-card-2026-11-21)" in wanted[report.PAGE]
    for line in (
        "| fast one | at least 100 tok/s | 123.4 tok/s |",
        "| slow one | at most 10 ms | 12 ms (missed); graphs off |",
        "| gone one | none | not measured; no peer |",
        "| new one | at least 80% | not measured |",
    ):
        assert line in wanted[report.README]
        assert line in wanted[report.PAGE]
    assert "| told one | - | 2.5x slower |" in wanted[report.PAGE]
    assert "told one" not in wanted[report.README]


def test_a_page_without_markers_is_named(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tree / report.PAGE).write_text("# Page\n")
    assert report.main(["--root", str(tree)]) == 1
    assert "docs/performance.md needs one line" in capfd.readouterr().err


def test_the_chart_has_every_point_in_its_place(tree: Path) -> None:
    told = document(model("demo", RATES), model("llava-45m", RATES))
    picture = ElementTree.fromstring(chart.draw(told))
    points = [node for node in picture.iter(f"{SVG}circle") if node.find(f"{SVG}title") is not None]
    shown = [node.find(f"{SVG}title").text for node in points]  # type: ignore[union-attr]
    assert len(points) == 2 * (3 + 1 + 3 + 2 + 1), "ours a second time is no system of its own"
    assert shown.count("Ours (bfloat16, 1 thread), 8 at once: 305 tokens/s, first token after 3.28 ms") == 2
    # In one panel: more tokens stand higher, later first tokens further right.
    ours = [node for node, title in zip(points, shown, strict=True) if title and title.startswith("Ours (")][:3]
    heights, places = ([float(node.attrib[axis]) for node in ours] for axis in ("cy", "cx"))
    assert heights == sorted(heights, reverse=True)
    assert places == sorted(places, reverse=True), "these figures' first tokens come sooner the faster"
    width, height = (float(picture.attrib[side]) for side in ("width", "height"))
    for node in points:
        assert 0 < float(node.attrib["cx"]) < width
        assert 0 < float(node.attrib["cy"]) < height
    labels = [node.text for node in picture.iter(f"{SVG}text") if node.attrib.get("class", "").startswith("at ")]
    assert sorted(labels) == sorted(["1", "8", "32"] * 4 + ["8"] * 2 + ["1", "8"] * 2 + ["1"] * 2)
    legend = [node.text for node in picture.iter(f"{SVG}text") if node.attrib.get("class") == "legend"]
    assert legend == ["Ours", "Ours-deterministic", "Transformers", "Transformers-defaults", "Llama-model-q8_0"]
    style = picture.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style


def test_a_chart_of_a_model_that_failed_is_drawn_without_it() -> None:
    told = document(model("demo", {}, failed=("ours",)), model("llava-45m", RATES))
    picture = chart.draw(told)
    assert ">llava-45m<" in picture
    assert ">demo<" not in picture
    ElementTree.fromstring(chart.draw(document(model("demo", {}, failed=("ours",)))))


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(30, 900, [50, 100, 200, 500]), (0.9, 2.5, [1, 2]), (1, 10**6, [1, 10, 100, 1000, 10**4, 10**5, 10**6])],
)
def test_ticks_are_round_and_few(least: float, most: float, expected: list[float]) -> None:
    assert chart.ticks(least, most) == expected


def test_what_fits_a_card_is_what_the_doctor_computes(repository: Path) -> None:
    """To two per cent: the page's figures are computed, and a changed default is to show."""
    page = (repository / "docs/performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (llava-\S+) \| (\w+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 6
    for shape, precision, cells in rows:
        with tempfile.TemporaryDirectory() as folder:
            write_preset(shape, Path(folder))
            config = read_config(Path(folder))
        weights, *cards = cells.split(" | ")
        for size, cell in zip((12, 24, 48, 80), cards, strict=True):
            memory = Memory(is_gpu=True, total=size * GIB, free=size * GIB - 600 * 2**20)
            fit = plan(shape, config, precision, memory, Settings())
            assert float(weights.split()[0]) == pytest.approx(fit.weight_bytes / GIB, rel=0.02)
            tokens, requests = (int(n.replace(",", "")) for n in re.findall(r"[\d,]+", cell)) if cell != "-" else (0, 0)
            assert tokens == pytest.approx(fit.cache_tokens, rel=0.02), (shape, precision, size)
            assert requests == tokens // 704


def test_the_report_needs_nothing_but_the_standard_library(tree: Path, repository: Path) -> None:
    command = [sys.executable, "-S", "-m", "benchmarks.report", "--root", str(tree)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    assert "written: README.md" in done.stdout
