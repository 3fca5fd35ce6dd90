"""The engine against transformers: the definition of correct.

Every logits row that the engine samples from is compared with what transformers computes for the same tokens and
pictures in float32. Greedy tokens are equal up to the first position where the reference's two best logits are
closer than twice the tolerance.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import CLIP, RECORDABLE, Album, Answer, make_engine, make_prompt, make_request, picture, run
from PIL import ExifTags, Image, ImageOps
from transformers import AutoImageProcessor, LlavaForConditionalGeneration

import sightline_server.engine.runner as runner_module
from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_models.config import read_config
from sightline_models.images import decode_image, prepare, read_preprocess_config
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm
from sightline_server.engine.types import Request

TOLERANCE = 1e-4
NEW_TOKENS = 12

SHAPES: dict[str, dict[str, Any]] = {
    "heads-of-16-grouped": {"preset": "tiny", "seed": 1},
    "heads-of-64-tied": {
        "preset": "tiny",
        "seed": 2,
        "hidden_size": 128,
        "num_heads": 2,
        "num_kv_heads": 1,
        "tie_word_embeddings": True,
        "names": "old",
    },
    "heads-of-32-larger-picture-sharded": {
        "preset": "tiny",
        "seed": 3,
        "hidden_size": 96,
        "num_heads": 3,
        "num_kv_heads": 3,
        "image_size": 48,
        "shards": 3,
    },
    "heads-of-48-old-names-sharded": {
        "preset": "tiny",
        "seed": 4,
        "hidden_size": 192,
        "num_heads": 4,
        "num_kv_heads": 2,
        "patch_size": 16,
        "shards": 2,
        "names": "old",
    },
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Pair":
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, dtype="float32", **SHAPES[request.param])
    return Pair(folder)


class Pair:
    """One checkpoint, loaded by us and by transformers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ours = self.load(REFERENCES)
        self.theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def load(self, kernels: Kernels) -> Vlm:
        config, cpu = read_config(self.folder), torch.device("cpu")
        return load_vlm(self.folder, config, CLIP, dtype=torch.float32, device=cpu, kernels=kernels)

    @torch.inference_mode()
    def reference(self, request: Request, token_ids: list[int], album: Album) -> torch.Tensor:
        """Transformers' logits [len(token_ids), V] at the positions the engine sampled ``token_ids`` from."""
        prompt = request.prompt
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[*prompt.token_ids, *token_ids]])}
        if prompt.images:
            pixels = np.stack([album.pixels[span.digest] for span in prompt.images])
            mean, std = torch.tensor(CLIP.mean), torch.tensor(CLIP.std)
            normalized = (torch.from_numpy(pixels).float() * CLIP.rescale_factor - mean) / std
            inputs["pixel_values"] = normalized.permute(0, 3, 1, 2)
        logits = self.theirs(**inputs).logits[0]
        return logits[len(prompt.token_ids) - 1 : -1] if token_ids else logits[:0]


class Recorder:
    """Keeps every logits row the engine samples from, by request and place in the answer."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], torch.Tensor] = {}

    def __call__(self, logits_SV: torch.Tensor, sequences: list[Any], draw: Any) -> Any:
        for row, sequence in zip(logits_SV, sequences, strict=True):
            self.rows[sequence.id, sequence.num_drawn] = row.clone()
        return self.choose(logits_SV, sequences, draw)

    choose = staticmethod(runner_module.choose_tokens)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    monkeypatch.setattr(runner_module, "choose_tokens", made)
    return made  # type: ignore[return-value]


def requests_of(model: Vlm, album: Album, count: int = 16) -> list[Request]:
    """Prompts of different lengths with 0, 1 and 3 pictures, some of them shared."""
    size = model.config.vision.image_size
    requests = []
    for i in range(count):
        parts: list[Any] = [2 + 3 * i % 17]
        for j in range((0, 1, 3)[i % 3]):
            parts += [picture(size, (i + j) % 5), 1 + j]
        requests.append(make_request(f"r{i}", make_prompt(model, album, parts, seed=i), max_tokens=NEW_TOKENS))
    return requests


def assert_equal(pair: Pair, requests: list[Request], answers: dict[str, Answer], rows: Recorder, album: Album) -> None:
    for request in requests:
        token_ids = answers[request.id].token_ids
        assert len(token_ids) == NEW_TOKENS
        expected = pair.reference(request, token_ids, album)
        got = torch.stack([rows.rows[request.id, i] for i in range(NEW_TOKENS)])
        assert expected.std() > 0.3, "logits without spread prove nothing"
        worst = (got - expected).abs().max().item()
        assert worst <= TOLERANCE, f"{request.id}: logits differ by {worst}"
        for position, token in enumerate(token_ids):
            best = expected[position].topk(2)
            if best.values[0] - best.values[1] < 2 * TOLERANCE:
                break
            assert token == best.indices[0], f"{request.id}: token {position} is {token}, not {best.indices[0]}"


def test_alone(pair: Pair, recorder: Recorder) -> None:
    album = Album()
    for request in requests_of(pair.ours, album, 6):
        answers = run(make_engine(pair.ours), [request], album)
        assert_equal(pair, [request], answers, recorder, album)


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param({}, id="plain"),
        pytest.param({"max_step_tokens": 16 + 7, "max_running": 16}, id="chunks-beside-decodes"),
        pytest.param({"max_step_tokens": 7, "max_running": 3}, id="chunks-of-7"),
        pytest.param({"prefix_caching": False, "encoder_cache_bytes": 0}, id="no-caches"),
        pytest.param({"deterministic": True}, id="deterministic"),
        pytest.param({"overlap": True, "max_step_tokens": 23, "max_running": 16}, id="late"),
    ],
)
def test_in_a_mixed_batch_of_16(pair: Pair, recorder: Recorder, bounds: dict[str, Any]) -> None:
    album = Album()
    requests = requests_of(pair.ours, album)
    answers = run(make_engine(pair.ours, **bounds), requests, album)
    assert_equal(pair, requests, answers, recorder, album)


@pytest.mark.parametrize("overlap", [False, True])
def test_replayed_from_recordings(pair: Pair, recorder: Recorder, overlap: bool) -> None:
    album = Album()
    # With log-probabilities tokens are drawn again, from logits that the recording left.
    requests = [
        make_request(request.id, request.prompt, max_tokens=NEW_TOKENS, logprobs=True)
        for request in requests_of(pair.ours, album)
    ]
    engine = make_engine(pair.load(RECORDABLE), graphs=True, overlap=overlap)
    answers = run(engine, requests, album)
    assert engine.stats().graph_steps_total >= NEW_TOKENS - 2
    assert_equal(pair, requests, answers, recorder, album)


def test_with_preemption(pair: Pair, recorder: Recorder) -> None:
    album = Album()
    requests = requests_of(pair.ours, album)
    longest = max(len(request.prompt.token_ids) for request in requests) + NEW_TOKENS
    engine = make_engine(pair.ours, num_blocks=-(-longest // 4) + 3, max_model_len=longest)
    answers = run(engine, requests, album)
    assert engine.stats().preemptions_total > 0
    assert_equal(pair, requests, answers, recorder, album)


def test_with_warm_caches(pair: Pair, recorder: Recorder) -> None:
    album = Album()
    engine = make_engine(pair.ours, num_blocks=2048)
    requests = requests_of(pair.ours, album)
    run(engine, requests, album)
    recorder.rows.clear()
    asked = len(album.asked)
    answers = run(engine, requests, album)
    assert len(album.asked) == asked, "a picture was asked for again"
    assert engine.stats().prefix_hits_total > 0
    assert_equal(pair, requests, answers, recorder, album)


def test_pictures_that_differ_in_one_region_or_in_order_change_logits_as_in_transformers(
    pair: Pair, recorder: Recorder
) -> None:
    album = Album()
    engine = make_engine(pair.ours)
    one = picture(pair.ours.config.vision.image_size, 1)
    other = one.copy()
    other[-8:, -8:] = 255 - other[-8:, -8:]
    orders = {"same": [one, 1, one, 5], "changed": [one, 1, other, 5], "swapped": [other, 1, one, 5]}
    requests = [
        make_request(name, make_prompt(pair.ours, album, parts, seed=1), max_tokens=NEW_TOKENS)
        for name, parts in orders.items()
    ]
    for _ in range(2):
        answers = run(engine, requests, album)
        assert_equal(pair, requests, answers, recorder, album)
    firsts = [recorder.rows[name, 0] for name in orders]
    assert min((firsts[i] - firsts[j]).abs().max().item() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def encoded(kind: str, variant: int) -> bytes:
    """One of two files that hold the same numbers and show different pictures."""
    numbers = np.random.default_rng(5).integers(0, 4, (40, 56), np.uint8)
    file = io.BytesIO()
    if kind == "palette":
        image = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
        colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (240, 240, 10)]
        image.putpalette([value for colour in (colours if variant else colours[::-1]) for value in colour])
        image.save(file, "PNG")
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if variant else 1
        Image.fromarray(numbers * 60).convert("RGB").save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["palette", "exif"])
def test_files_that_differ_in_palette_or_orientation_alone_give_the_logits_of_what_they_show(
    pair: Pair, recorder: Recorder, kind: str
) -> None:
    preprocess = read_preprocess_config(pair.folder, pair.ours.config)
    processor = AutoImageProcessor.from_pretrained(pair.folder, backend="pil")
    album, theirs, engine = Album(), Album(), make_engine(pair.ours)
    requests = []
    for variant in (0, 1):
        data = encoded(kind, variant)
        prepared = prepare(decode_image(data, max_pixels=10**6), preprocess)
        parts: list[Any] = [3, prepared.pixels, 5]
        request = make_request(f"{kind}{variant}", make_prompt(pair.ours, album, parts), max_tokens=NEW_TOKENS)
        requests.append(request)
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        pixels = processor(shown, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        theirs.pixels[request.prompt.images[0].digest] = pixels.transpose(1, 2, 0).astype(np.uint8)
    for _ in range(2):
        answers = run(engine, requests, album)
        assert_equal(pair, requests, answers, recorder, theirs)
    first, second = (recorder.rows[request.id, 0] for request in requests)
    assert (first - second).abs().max() > 1e-3
