"""The true server around quantized weights, as its operator starts it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sightline_models.tiny import write_checkpoint


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_server_of_quantized_random_weights_answers(scheme: str, start_server: Callable[..., Any]) -> None:
    server = start_server("--random", "tiny", "--quantize", scheme, "--threads", "1", "--cpu-cache-gb", "0.05")
    server.wait_until_told_ready()
    assert f"precision  weights of linear layers {scheme}, all else float32" in server.stdout
    (card,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert (card["dtype"], card["quantization"]) == ("float32", scheme)
    body = {
        "model": card["id"],
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
    }
    answers = [httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120).json() for _ in range(2)]
    assert answers[0]["usage"]["completion_tokens"] == 12
    assert answers[0]["choices"][0]["message"]["content"] == answers[1]["choices"][0]["message"]["content"]


def test_a_server_that_checks_its_weights_tells_what_it_found(start_server: Callable[..., Any]) -> None:
    """At the start, and to a client that asks for the model."""
    server = start_server(
        "--random", "tiny", "--quantize", "nf4", "--verify", "--threads", "1", "--cpu-cache-gb", "0.05"
    )
    server.wait_until_told_ready()
    assert "checked    nf4 against unquantized weights, 8 questions about drawn pictures" in server.stdout
    assert "loading the unquantized weights" in server.stderr
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    model = client.models.retrieve("random-tiny")
    assert (model.id, model.owned_by) == ("random-tiny", "sightline")
    assert [listed.id for listed in client.models.list()] == ["random-tiny"]
    assert model.model_extra is not None
    found = model.model_extra["verification"]
    assert (found["outcome"], found["quantization"], found["num_answers"]) == ("compared", "nf4", 8)
    assert 0 < found["mean_kl"] < found["worst_kl"]
    assert 0 < found["top1_agreement"] <= 1
    assert found["served"]["weight_bytes"] < found["unquantized"]["weight_bytes"]
    assert min(found[whose]["decode_tokens_per_s"] for whose in ("served", "unquantized")) > 0
    assert "KL divergence" in found["message"]


def test_a_checkpoint_quantized_otherwise_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = (tmp_path / "config.json").read_text()
    stated = '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}, '
    (tmp_path / "config.json").write_text(config.replace("{", stated, 1))
    command = [sys.executable, "-m", "sightline_server.cli.main", "serve", str(tmp_path), "--quantize", "nf4"]
    ended = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    assert "--quantize nf4: this checkpoint is already quantized, as int8" in ended.stderr
    assert "Traceback" not in ended.stderr
