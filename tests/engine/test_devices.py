"""What holds on a CPU holds on a GPU: the same tests, the GPU's marked so."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import CLIP, RECORDABLE, Album, make_engine, make_prompt, make_request, picture, run
from torch.overrides import TorchFunctionMode

from sightline_kernels.dispatch import REFERENCES, choose
from sightline_models.config import read_config
from sightline_models.decoder import kernel_workload
from sightline_models.tiny import write_checkpoint
from sightline_models.vlm import Vlm
from sightline_models.weights import load_vlm
from sightline_server.engine.load import use_device
from sightline_server.engine.transfer import Arriving
from sightline_server.engine.types import FinishReason, Request

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("devices")
    write_checkpoint(made, seed=3)
    return made


def load(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Vlm:
    use_device(torch.device(device))
    return load_vlm(folder, read_config(folder), CLIP, dtype=dtype, device=torch.device(device))


def mixed_requests(model: Vlm, album: Album, **params: Any) -> list[Request]:
    size = model.config.vision.image_size
    parts: list[list[Any]] = [
        [9],
        [3, picture(size, 1), 6],
        [picture(size, 2), 2, picture(size, 3), 7],
        [40],
        [5, picture(size, 1), 11],
    ]
    return [
        make_request(f"r{i}", make_prompt(model, album, each, seed=i), seed=i, **params) for i, each in enumerate(parts)
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_float32_probabilities_are_those_of_plain_prefills_on_a_cpu(folder: Path, device: str) -> None:
    """Tokens sampled on the device in one mixed batch, then scored on a CPU, each by one prefill of its own."""
    album, model, scorer = Album(), load(folder, device), load(folder, "cpu")
    requests = mixed_requests(model, album, temperature=1.0, max_tokens=6, logprobs=True)
    answers = run(make_engine(model, device=device, max_step_tokens=48), requests, album)
    for request in requests:
        answer = answers[request.id]
        assert answer.reason is FinishReason.LENGTH
        for position, (token_id, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
            told = tuple(answer.token_ids[:position])
            again = make_request(
                "again",
                type(request.prompt)(request.prompt.token_ids + told, request.prompt.images),
                max_tokens=1,
                logprobs=True,
                logit_bias={token_id: 100.0},
            )
            scored = run(make_engine(scorer), [again], album)["again"]
            assert scored.token_ids == [token_id]
            assert logprob == pytest.approx(scored.logprobs[0], abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_answers_know_no_batch_mates(folder: Path, device: str) -> None:
    album, model = Album(), load(folder, device)
    requests = mixed_requests(model, album, temperature=1.0, max_tokens=12, logprobs=True)
    together = run(make_engine(model, device=device, deterministic=True), requests, album)
    for request in requests:
        alone = run(make_engine(model, device=device, deterministic=True), [request], album)[request.id]
        assert (alone.token_ids, alone.logprobs) == (together[request.id].token_ids, together[request.id].logprobs)


@pytest.mark.parametrize("device", DEVICES)
def test_preempted_requests_go_on_where_they_were(folder: Path, device: str) -> None:
    album, model = Album(), load(folder, device)
    requests = mixed_requests(model, album, temperature=1.0, max_tokens=30)
    roomy = run(make_engine(model, device=device, deterministic=True), requests, album)
    engine = make_engine(model, device=device, deterministic=True, num_blocks=34)
    cramped = run(engine, requests, album)
    assert engine.stats().preemptions_total > 0
    for request in requests:
        assert cramped[request.id].token_ids == roomy[request.id].token_ids


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "mode", [{"overlap": True}, {"graphs": True}, {"overlap": True, "graphs": True}], ids=["late", "recorded", "both"]
)
def test_late_and_recorded_steps_answer_as_plain_ones(folder: Path, device: str, mode: dict[str, bool]) -> None:
    """On a GPU with the kernels that are recorded there; the CPU has stand-ins (``CallAgain``)."""
    album, plain = Album(), load(folder, "cpu")
    requests = [*mixed_requests(plain, album, max_tokens=20), *mixed_requests(plain, album, temperature=1.0, top_p=0.9)]
    requests = [make_request(f"n{i}", each.prompt, **_params(each)) for i, each in enumerate(requests)]
    expected = run(make_engine(plain), requests, album)
    config = read_config(folder)
    where = torch.device(device)
    fused = choose("auto", kernel_workload(config.decoder, dtype=torch.float32, device=where))
    kernels = fused if device == "cuda" else RECORDABLE
    model = load_vlm(folder, config, CLIP, dtype=torch.float32, device=where, kernels=kernels)
    engine = make_engine(model, device=device, **mode)
    for _ in range(2):
        answers = run(engine, requests, album)
        for name, answer in answers.items():
            assert answer.token_ids == expected[name].token_ids
            for logprob, right in zip(answer.logprobs, expected[name].logprobs, strict=True):
                assert logprob == pytest.approx(right, abs=1e-3)
    assert (engine.stats().graph_steps_total > 0) == ("graphs" in mode)


def _params(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    # Some are drawn from the recording, some again from its logits.
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "logprobs": sampling.seed % 2 == 1,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_whole_and_finite(folder: Path, device: str, dtype: torch.dtype) -> None:
    album, model = Album(), load(folder, device, dtype)
    requests = mixed_requests(model, album, temperature=1.0, max_tokens=6, logprobs=True, top_logprobs=3)
    for answer in run(make_engine(model, device=device), requests, album).values():
        assert len(answer.token_ids) == 6
        assert all(logprob is not None and -100 < logprob <= 0 for logprob in answer.logprobs)


class NoWaiting(TorchFunctionMode):
    """Fails when a tensor is made of host numbers on the device: the host waits for such a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor:
            assert torch.device(kwargs.get("device") or "cpu").type == "cpu", "copied where the host waits for it"
        return func(*args, **kwargs)


def unread_attention(q_THD: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(q_THD)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_waits_for_its_tokens_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, graphs: bool
) -> None:
    """Shown on the meta device, whose tensors hold no values: all that would wait for one raises, but for this one."""
    with torch.device("meta"):
        # What attention reads of the layout on a GPU is its kernel's business; here any that can be recorded will do.
        kernels = dataclasses.replace(REFERENCES, paged_attention=unread_attention) if graphs else REFERENCES
        model = Vlm(read_config(folder), CLIP, kernels).to(torch.bfloat16)
    model.build_tables()
    waits = []

    def wait(arriving: Arriving) -> list[torch.Tensor]:
        waits.append(arriving)
        return [torch.full(value.shape, 9, dtype=value.dtype, device="cpu") for value in arriving._values]

    monkeypatch.setattr(Arriving, "wait", wait)
    album, engine = Album(), make_engine(model, device="meta", max_step_tokens=48, overlap=overlap, graphs=graphs)
    requests = [
        *mixed_requests(model, album),
        make_request("filtered", make_prompt(model, album, [7]), temperature=1.0, top_p=0.5, top_k=3, min_p=0.1),
        make_request("biased", make_prompt(model, album, [7]), logit_bias={3: 1.0}, min_tokens=3, stop_token_ids=(1,)),
        make_request("penalized", make_prompt(model, album, [7]), repetition_penalty=1.1, presence_penalty=0.5),
    ]
    with NoWaiting():
        answers = run(engine, requests, album)
    assert {answer.reason for answer in answers.values()} == {FinishReason.LENGTH}
    assert 0 < len(waits) <= engine.stats().steps_total
    assert (engine.stats().graph_steps_total > 0) == graphs
