"""The check of quantized weights: its figures mean what they say, and whatever goes wrong is said, not raised."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import Album, make_engine, make_request, run
from safetensors.torch import load_file, save_file

from sightline_models.config import CheckpointError, read_config
from sightline_models.images import read_preprocess_config
from sightline_models.presets import demo_checkpoint, write_preset
from sightline_models.quantization_config import Quantization
from sightline_models.quantize import Int8Linear
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm
from sightline_server.engine import load, trial, verify
from sightline_server.engine.trial import Answered
from sightline_server.engine.types import EngineConfig, Verification
from sightline_server.engine.verify import Failure, Subject
from sightline_server.settings import Settings

CPU = torch.device("cpu")
LIMITS = EngineConfig(
    num_blocks=1,
    block_size=16,
    max_model_len=2048,
    max_step_tokens=512,
    max_running=16,
    max_queue=16,
    encoder_cache_bytes=2**20,
)


def subject_of(folder: Path, quantization: Quantization = "nf4", **changes: int) -> Subject:
    return Subject(
        folder=folder,
        config=read_config(folder),
        chat_template=None,
        quantization=quantization,
        dtype=torch.float32,
        device=CPU,
        limits=replace(LIMITS, **changes),
    )


def made(folder: Path, quantization: Quantization = "none") -> Vlm:
    config = read_config(folder)
    normalization = read_preprocess_config(folder, config).normalization
    return load_vlm(folder, config, normalization, dtype=torch.float32, device=CPU, quantize=quantization)


def checked(folder: Path, quantization: Quantization) -> Verification:
    subject = subject_of(folder, quantization)
    return verify.verify(subject, made(folder, quantization), verify.ask_unquantized(subject, lambda: made(folder)))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, seed=4)
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest, tiny_folder: Path) -> Path:
    return demo_checkpoint() if request.param == "demo" else tiny_folder


@pytest.mark.parametrize("folder", ["tiny", "demo"], indirect=True)
def test_the_same_weights_are_nothing_apart_and_fewer_bits_further(folder: Path) -> None:
    subject = subject_of(folder)
    both = [verify.ask_unquantized(subject, lambda: made(folder)) for _ in range(2)]
    assert all(isinstance(one, Answered) for one in both)
    same = verify.compare(both[0], both[1], "none")  # type: ignore[arg-type]
    assert (same.mean_kl, same.worst_kl, same.top1_agreement) == (0.0, 0.0, 1.0)
    int8, nf4 = checked(folder, "int8"), checked(folder, "nf4")
    for found in (int8, nf4):
        assert found.outcome == "compared"
        assert found.num_answers == len(trial.QUESTIONS)
        assert found.num_positions == same.num_positions > found.num_answers
        assert found.worst_kl is not None
        assert found.mean_kl is not None
        assert 0 < found.mean_kl < found.worst_kl
    assert int8.mean_kl is not None
    assert nf4.mean_kl is not None
    assert int8.mean_kl < 0.1 * nf4.mean_kl
    assert nf4.mean_kl < 0.1
    assert int8.top1_agreement is not None
    assert nf4.top1_agreement is not None
    assert 1.0 >= int8.top1_agreement >= max(0.95, nf4.top1_agreement)


def test_costs_are_those_of_either_model(tiny_folder: Path) -> None:
    found = checked(tiny_folder, "int8")
    assert found.served is not None
    assert found.unquantized is not None
    for pace, quantization in ((found.served, "int8"), (found.unquantized, "none")):
        assert pace.weight_bytes == made(tiny_folder, quantization).num_bytes
        assert 0 < pace.decode_tokens_per_s < 1e6
        assert 0 < pace.prompt_tokens_per_s < 1e8
    assert found.served.weight_bytes < found.unquantized.weight_bytes


def test_answers_and_probabilities_are_the_engines(tiny_folder: Path) -> None:
    """What is compared is what would be served: greedy tokens and their log-probabilities equal the engine's."""
    model, config = made(tiny_folder), read_config(tiny_folder)
    cases = trial.draw_cases(tiny_folder, config, chat_template=None, longest=2048)
    album = Album()
    for case in cases:
        (span,) = case.prompt.images
        album.pixels[span.digest] = case.pixels
    requests = [
        make_request(f"r{index}", case.prompt, max_tokens=trial.ANSWER_TOKENS, logprobs=True)
        for index, case in enumerate(cases)
    ]
    served = run(make_engine(model, num_blocks=2048), requests, album)
    # In chunks smaller than a picture.
    limits = replace(LIMITS, max_step_tokens=7, block_size=4)
    answered = trial.answer(model, cases, limits, CPU, end=frozenset())
    for index, (tokens, logits_PV) in enumerate(zip(answered.answers, answered.logits_PV, strict=True)):
        assert served[f"r{index}"].token_ids == list(tokens)
        ours_P = logits_PV.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert served[f"r{index}"].logprobs == pytest.approx(ours_P.tolist(), abs=1e-4)


def test_an_answer_ends_with_its_end_token() -> None:
    """The demo model is brief: hardly an answer is as long as it may be, and none goes on past its end."""
    folder = demo_checkpoint()
    end = trial.end_tokens(folder, read_config(folder))
    answered = verify.ask_unquantized(subject_of(folder), lambda: made(folder))
    assert isinstance(answered, Answered)
    for tokens, logits_PV in zip(answered.answers, answered.logits_PV, strict=True):
        assert len(logits_PV) == len(tokens) <= trial.ANSWER_TOKENS
        assert not end & set(tokens[:-1])
        assert logits_PV.argmax(-1).tolist() == list(tokens)
    assert sum(tokens[-1] in end for tokens in answered.answers) >= 6


def break_codes(model: Vlm) -> None:
    """One matrix's rows in another order, as a bad copy or a wrong kernel would have them."""
    broken = model.decoder.layers[0].attention.o
    assert isinstance(broken, Int8Linear)
    broken.codes_OI.copy_(broken.codes_OI.flip(0))


def test_a_broken_weight_shows(tiny_folder: Path) -> None:
    subject, model = subject_of(tiny_folder, "int8"), made(tiny_folder, "int8")
    original = verify.ask_unquantized(subject, lambda: made(tiny_folder))
    sound = verify.verify(subject, model, original).mean_kl
    break_codes(model)
    found = verify.verify(subject, model, original)
    assert sound is not None
    assert found.mean_kl is not None
    assert found.mean_kl > 100 * sound
    assert found.top1_agreement is not None
    assert found.top1_agreement < 0.9


def write_outliers(even: Path, folder: Path) -> None:
    """The same function with a few channels up to 300 times as large between a norm and its matrices."""
    folder.mkdir()
    for file in even.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    before_attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    before_mlp = ("mlp.gate_proj", "mlp.up_proj")
    for name in [name for name in weights if "language_model" in name and name.endswith("layernorm.weight")]:
        layer = name.rsplit(".", 2)[0]
        factors = torch.ones_like(weights[name])
        factors[torch.randperm(len(factors), generator=generator)[:3]] = torch.tensor([300.0, 100.0, 30.0])
        weights[name] = weights[name] / factors
        for matrix in before_mlp if "post_attention" in name else before_attention:
            weights[f"{layer}.{matrix}.weight"] = weights[f"{layer}.{matrix}.weight"] * factors
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_outlier_channels_show(tiny_folder: Path, tmp_path: Path) -> None:
    write_outliers(tiny_folder, tmp_path / "outliers")
    subject = subject_of(tiny_folder)
    even = verify.ask_unquantized(subject, lambda: made(tiny_folder))
    same = verify.verify(subject, made(tmp_path / "outliers"), even)
    assert same.mean_kl is not None
    assert same.mean_kl < 1e-6, "the rescaling changed the function"
    for scheme in ("int8", "nf4"):
        plain, hurt = checked(tiny_folder, scheme).mean_kl, checked(tmp_path / "outliers", scheme).mean_kl
        assert plain is not None
        assert hurt is not None
        assert hurt > 3 * plain


# What can go wrong


def out_of_memory() -> Vlm:
    raise torch.OutOfMemoryError("planted")


def bad_weights() -> Vlm:
    raise CheckpointError("model.safetensors: planted.")


def bug() -> Vlm:
    raise IndexError("planted")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (out_of_memory, "its weights take 0.00 GiB, and cpu is too full. Check on a machine with more memory"),
        (bad_weights, "The check could not be made: model.safetensors: planted."),
        (bug, "The check failed with IndexError: planted. Leave --verify out to serve without it."),
    ],
)
def test_an_unquantized_model_that_cannot_be_asked_is_a_named_result(
    make: Callable[[], Vlm], sentence: str, tiny_folder: Path
) -> None:
    subject = subject_of(tiny_folder)
    found = verify.verify(subject, made(tiny_folder, "nf4"), verify.ask_unquantized(subject, make))
    assert (found.outcome, found.mean_kl, found.unquantized) == ("failed", None, None)
    assert sentence in found.message
    assert found.served is not None, "the model that is served was timed all the same"


def test_a_check_that_fails_in_the_middle_leaves_the_threads_as_they_were(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def fails_at_the_second_token(self: Vlm, hidden_SD: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise IndexError("planted")
        return self.decoder.logits(hidden_SD)

    monkeypatch.setattr(Vlm, "logits", fails_at_the_second_token)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = verify.verify(subject_of(tiny_folder), made(tiny_folder, "nf4"), None)
        assert found.message.startswith("The check failed with IndexError")
        assert seen == [2, 1], "one row is computed with one thread"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_larger_than_the_free_memory_is_not_even_tried(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.cgroups, "memory_left", lambda: 1000)
    failure = verify.ask_unquantized(subject_of(tiny_folder), bug)
    assert isinstance(failure, Failure)
    assert "was not asked" in failure.message


def test_logits_that_are_not_numbers_are_a_named_result(tiny_folder: Path) -> None:
    subject, model = subject_of(tiny_folder, "int8"), made(tiny_folder, "int8")
    broken = model.decoder.layers[0].attention.o
    assert isinstance(broken, Int8Linear)
    broken.absmax_O.fill_(torch.inf)
    # Those made before, where the CPU multiplies codes.
    broken.scales = None
    found = verify.verify(subject, model, verify.ask_unquantized(subject, lambda: made(tiny_folder)))
    assert (found.outcome, found.mean_kl) == ("failed", None)
    assert "The quantized model's logits are not all finite" in found.message


def test_a_checkpoint_quantized_on_disk_has_no_original(tiny_folder: Path) -> None:
    plain = subject_of(tiny_folder, "nf4")
    subject = replace(plain, config=replace(plain.config, quantization="nf4"))
    assert verify.ask_unquantized(subject, bug) is None
    found = verify.verify(subject, made(tiny_folder, "nf4"), None)
    assert (found.outcome, found.mean_kl, found.unquantized) == ("nothing_to_compare", None, None)
    assert "are nf4 on disk, so there is nothing to compare with" in found.message
    assert found.served is not None


def test_a_context_too_short_for_a_picture_is_a_named_result(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=32)
    found = checked(tmp_path, "nf4")
    assert found.outcome == "failed"
    assert "don't fit 32 positions: leave --verify out" in found.message


# As the engine loads it


@pytest.mark.parametrize("shape", ["", "tiny"])
def test_the_engine_checks_when_it_is_told_to(
    shape: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two models there is only ever one, and the engine is none the worse for the check."""
    alive: list[weakref.ref[Vlm]] = []
    stages: list[str] = []
    for name in ("load_vlm", "random_vlm"):
        true = getattr(load, name)

        def watched(*arguments: object, true: Callable[..., Vlm] = true, **named: object) -> Vlm:
            assert all(reference() is None for reference in alive), "both models at once"
            model = true(*arguments, **named)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(load, name, watched)
    folder = tiny_folder
    if shape:
        folder = tmp_path
        write_preset(shape, folder)
    settings = Settings(device="cpu", threads=2, cpu_cache_gb=0.01, quantize="nf4", verify=True, random=shape)
    before = torch.get_num_threads()
    try:
        _, info = load.load_engine(folder, settings, lambda stage, share: stages.append(stage))
        assert torch.get_num_threads() == 2, "the check left other threads behind"
    finally:
        torch.set_num_threads(before)
    assert len(alive) == 2
    assert info.verification is not None
    assert info.verification.outcome == "compared"
    assert info.verification.served is not None
    assert info.verification.served.weight_bytes == info.weight_bytes
    assert list(dict.fromkeys(stages)) == [
        "loading the unquantized weights",
        "loading weights",
        "checking the weights",
        "sizing the cache",
    ]


def test_nothing_is_checked_unasked_and_nothing_compared_unquantized(tiny_folder: Path) -> None:
    settings = Settings(device="cpu", threads=1, cpu_cache_gb=0.01, quantize="nf4")
    assert load.load_engine(tiny_folder, settings, lambda stage, share: None)[1].verification is None
    plain = Settings(device="cpu", threads=1, cpu_cache_gb=0.01, verify=True)
    found = load.load_engine(tiny_folder, plain, lambda stage, share: None)[1].verification
    assert found is not None
    assert found.outcome == "nothing_to_compare"
    assert found.message.endswith("add --quantize int8 or nf4.")
