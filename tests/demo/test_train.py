"""A run makes a checkpoint, goes on after it was killed, shares its steps among processes and leaves none behind.

Minutes here are hundredths, or pass on a clock that is fast.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor, LlavaForConditionalGeneration

from sightline_models.demo import network, train
from sightline_models.demo.labels import CHARACTERS, CLASSES, OUTPUTS
from sightline_models.demo.network import DECODER, Shape
from sightline_models.demo.scenes import COLORS, SHAPES
from sightline_models.demo.text import Codec, to_json
from sightline_models.demo.train import Plan
from sightline_models.demo.words import ITEMS

PATIENCE = 150.0


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, float]] = []
        self.noted: list[tuple[str, dict[str, float]]] = []

    def step(self, stage: str, progress: float, loss: float, pictures: int) -> None:
        assert loss > 0
        assert pictures > 0
        self.steps.append((stage, progress))

    def scores(self, stage: str, minutes: float, scores: dict[str, float]) -> None:
        self.noted.append((stage, scores))


@pytest.fixture(scope="module")
def plan(small: Shape) -> Plan:
    return Plan(minutes=0.012, seeing_share=0.3, compile=False, seeing_rows=2, answering_rows=2, shape=small)


@pytest.fixture(scope="module")
def quick_tokenizer(tokenizer: Tokenizer) -> Iterator[None]:
    """The tokenizer that every run would train for itself, trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_tokenizer", lambda size: tokenizer)
        # A run sets it for its own process, which here is that of all tests.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        yield


@pytest.fixture(scope="module")
def finished(plan: Plan, quick_tokenizer: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes]:
    folder, notes = tmp_path_factory.mktemp("run"), Notes()
    assert train.train(plan, folder, notes) == folder / "checkpoint"
    return folder, notes


def saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return state


def test_a_run_makes_a_checkpoint_that_transformers_loads(finished: tuple[Path, Notes], plan: Plan) -> None:
    checkpoint = finished[0] / "checkpoint"
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    logits = model(**inputs).logits
    assert logits.shape[-1] == plan.shape.vocab_size
    assert logits.isfinite().all()
    before = network.initial_weights(plan.shape, torch.Generator().manual_seed(plan.seed))
    after = saved(finished[0])["weights"]
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if "post_layernorm" not in name}


def test_a_run_sees_first_and_answers_then(finished: tuple[Path, Notes]) -> None:
    folder, notes = finished
    stages = [stage for stage, _ in notes.steps]
    assert stages == sorted(stages, key=train.STAGES.index)
    assert set(stages) == set(train.STAGES)
    for stage in train.STAGES:
        progress = [at for name, at in notes.steps if name == stage]
        assert progress[0] == 0
        assert progress == sorted(set(progress))
        assert progress[-1] < 1
    assert [stage for stage, _ in notes.noted] == list(train.STAGES)
    assert all(0 <= score <= 1 for name, score in notes.noted[1][1].items() if not name.startswith("patch/"))
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["scores"]) for entry in history] == notes.noted
    assert history == saved(folder)["history"]
    lines = train.curves(history, lambda name: name == "patch/background")
    assert lines == {"patch/background": [(entry["minutes"], entry["scores"]["patch/background"]) for entry in history]}


def test_a_finished_run_is_not_run_again(finished: tuple[Path, Notes], plan: Plan) -> None:
    folder, _ = finished
    before, notes = (folder / "checkpoint/model.safetensors").read_bytes(), Notes()
    train.train(plan, folder, notes)
    assert notes.steps == []
    assert (folder / "checkpoint/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 2}, {"minutes": 1.0}, {"dense_weight": 0.0}], ids=str)
def test_another_plan_needs_another_folder(finished: tuple[Path, Notes], plan: Plan, change: dict[str, Any]) -> None:
    before = (finished[0] / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train.train(replace(plan, **change), finished[0])
    assert (finished[0] / "state.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "progress", "step", "rate"),
    [
        ("seeing", 0.0, 0, 1 / 60),
        ("seeing", 0.3, 500, 1.0),
        ("seeing", 1.0, 500, 0.3),
        ("answering", 0.0, 29, 0.5),
        ("answering", 0.35, 500, 1.0),
        ("answering", 0.675, 500, 0.5),
        ("answering", 1.0, 500, 0.0),
    ],
)
def test_rates_rise_hold_and_fall(stage: str, progress: float, step: int, rate: float) -> None:
    assert train._rate(stage, progress, step, hold=0.35) == pytest.approx(rate)


# A run whose seconds are half hours, which writes down every step it makes.
KILLED = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer

from sightline_models.demo import train
from sightline_models.demo.network import Shape

fields, folder, tokenizer = json.loads(sys.argv[1]), Path(sys.argv[2]), Tokenizer.from_file(sys.argv[3])
torch.set_num_threads(1)
train.time = SimpleNamespace(monotonic=lambda: time.monotonic() * 1800)
train.train_tokenizer = lambda size: tokenizer
train.train(train.Plan(**{**fields, "shape": Shape(**fields["shape"])}), folder)
"""


def wait_for(what: Any, process: "subprocess.Popen[bytes] | None" = None) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := what():
            return found
        assert process is None or process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.01)
    raise AssertionError(f"waited {PATIENCE} s in vain")


def test_a_killed_run_goes_on_where_it_was_last_saved(
    plan: Plan,
    tokenizer: Tokenizer,
    quick_tokenizer: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Long enough not to end before it is killed; the one that goes on is shown a time when it is nearly over.
    endless = replace(plan, minutes=1e6, seeing_share=1e-4)
    file, folder = tmp_path / "tokenizer.json", tmp_path / "run"
    file.write_text(to_json(tokenizer))
    command = [sys.executable, "-c", KILLED, json.dumps(asdict(endless)), str(folder), str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:

        def answering() -> dict[str, Any] | None:
            if not (folder / "state.pt").exists():
                return None
            state = saved(folder)
            return state if state["stage"] == "answering" and state["step"] > 2 else None

        wait_for(answering, process)
        process.send_signal(signal.SIGKILL)
    state = saved(folder)
    assert state["step"] > 2
    assert {len(kind["state"]) > 0 for kind in state["optimizers"].values()} == {True}

    made: list[tuple[str, int, float]] = []
    first: list[torch.Tensor] = []
    step = train._Trainer._step

    def note(self: Any, stage: str, batch: Any, tally: Any) -> tuple[float, int]:
        if not made:
            first.append(self.state.weights["lm_head.weight"].detach().clone())
        made.append((stage, self.state.step, self.state.seconds))
        return step(self, stage, batch, tally)

    # Each step takes a third of what is left at first: it ends after a few.
    left = endless.minutes * 60 * (1 - endless.seeing_share) - state["seconds"]
    ticks = iter(range(1, 1000))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks) * left / 6))
    monkeypatch.setattr(train._Trainer, "_step", note)
    train.train(endless, folder)
    assert made[0] == ("answering", state["step"], state["seconds"])
    assert torch.equal(first[0], state["weights"]["lm_head.weight"])
    assert [number for _, number, _ in made] == list(range(state["step"], state["step"] + len(made)))
    assert len(made) > 1
    assert saved(folder)["step"] == state["step"] + len(made)
    assert saved(folder)["pictures"] > state["pictures"]
    assert (folder / "checkpoint/model.safetensors").is_file()


def test_a_state_is_saved_whole_or_not_at_all(
    finished: tuple[Path, Notes], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    before = (folder / "state.pt").read_bytes()

    def break_off(fields: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match="No space"):
        train.train(plan, folder)
    assert (folder / "state.pt").read_bytes() == before


# The helper starts by importing this file anew, hence the guard; what stands before it holds in both processes.
SHARED = """
import json, sys
from pathlib import Path

from tokenizers import Tokenizer

from sightline_models.demo import train
from sightline_models.demo.network import Shape

fields, folder, steps, tokenizer = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
train.train_tokenizer = lambda size: Tokenizer.from_file(tokenizer)


class Count:
    def step(self, stage, progress, loss, pictures):
        with steps.open("a") as file:
            print(stage, pictures, file=file)

    def scores(self, stage, minutes, scores):
        pass


if __name__ == "__main__":
    train.train(train.Plan(**{**fields, "shape": Shape(**fields["shape"])}), folder, Count())
"""


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end children with their parent")
@pytest.mark.parametrize("killed", [False, True], ids=["ends", "is killed"])
def test_two_processes_share_a_run_and_leave_none_behind(
    plan: Plan, tokenizer: Tokenizer, tmp_path: Path, killed: bool
) -> None:
    plan = replace(plan, processes=2, minutes=10.0 if killed else 0.012)
    script, folder, steps, file = (tmp_path / name for name in ("shared.py", "run", "steps", "tokenizer.json"))
    script.write_text(SHARED)
    file.write_text(to_json(tokenizer))
    command = [sys.executable, str(script), json.dumps(asdict(plan)), str(folder), str(steps), str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            # A step takes both.
            wait_for(steps.exists, process)
            children = psutil.Process(process.pid).children(recursive=True)
            assert any("spawn_main" in " ".join(child.cmdline()) for child in children)
            if killed:
                process.send_signal(signal.SIGKILL)
            status = process.wait(PATIENCE)
        finally:
            process.kill()
    wait_for(lambda: not alive(children))
    if killed:
        assert status == -signal.SIGKILL
        return
    assert status == 0
    # Two pictures each in the first stage.
    assert steps.read_text().splitlines()[0] == "seeing 4"
    model = LlavaForConditionalGeneration.from_pretrained(folder / "checkpoint")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert saved(folder)["stage"] == "answering"
    assert not list(folder.glob("meeting-*"))


def test_words_start_from_the_directions_in_which_features_tell_them(small: Shape, codec: Codec) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = network.initial_weights(small, generator)
    heads = {"weight": torch.randn(OUTPUTS, small.width, generator=generator), "bias": torch.zeros(OUTPUTS)}
    before = {name: value.clone() for name, value in weights.items()}
    train.start_words(weights, heads, codec)
    starts = dict(zip(CLASSES, torch.tensor([0, *CLASSES.values()]).cumsum(0).tolist(), strict=False))
    at = {
        " red": starts["color"] + list(COLORS).index("red"),
        " star": starts["shape"] + SHAPES.index("star") + 1,
        "7": starts["character"] + CHARACTERS.index("7") + 1,
        " tea": starts["item"] + ITEMS.index("TEA") + 1,
    }
    for word, row in at.items():
        (token,) = codec.ids(word)
        for matrix in (weights[f"{DECODER}.embed_tokens.weight"], weights["lm_head.weight"]):
            assert torch.cosine_similarity(matrix[token], heads["weight"][row], dim=0) > 0.999, word
    (untouched,) = codec.ids(" where")
    assert torch.equal(weights["lm_head.weight"][untouched], before["lm_head.weight"][untouched])
