"""Models, health, metrics, the OpenAPI document, log lines, and the start without torch."""

import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_calls import CHAT, chat_body, http, openai_client
from fakes import ALIAS, MODEL_NAME, FakeEngine, FakePool, fake_app, fake_image
from prometheus_client.parser import text_string_to_metric_families

from sightline_models.config import CheckpointError
from sightline_server import logs
from sightline_server.chat.model import ServedModel
from sightline_server.engine.types import EngineStats
from sightline_server.protocol.chat import ChatRequest
from sightline_server.settings import Settings, SettingsError


async def test_models() -> None:
    client = openai_client(fake_app())
    assert [model.id async for model in client.models.list()] == [MODEL_NAME, ALIAS]
    model = (await client.models.retrieve(MODEL_NAME)).model_dump()
    assert model["id"] == MODEL_NAME
    assert model["aliases"] == [ALIAS]
    assert model["max_model_len"] == model["context_length"] == 512
    assert model["architecture"]["input_modalities"] == ["text", "image"]
    assert (model["dtype"], model["quantization"], model["verification"]) == ("float32", "none", None)
    assert model["default_sampling"] == {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0}
    assert (await client.models.retrieve(ALIAS)).id == ALIAS


@pytest.mark.parametrize("path", ["/v1/models/other", "/v1/models/acme", "/v1/models/", "/v1/models/%00%1b[2J"])
async def test_unknown_models(path: str) -> None:
    async with http(fake_app()) as client:
        answer = await client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_names_with_slashes_and_escapes() -> None:
    async with http(fake_app()) as client:
        for path in ("/v1/models/acme/fake-vlm", "/v1/models/acme%2Ffake-vlm", "/v1/models/acme%2ffake%2Dvlm"):
            assert (await client.get(path)).json()["id"] == MODEL_NAME


async def test_metrics() -> None:
    engine, pool = FakeEngine("four"), FakePool(decoded_total=6)
    engine.restarts = 2
    engine.become(
        stats=EngineStats(
            running=3, waiting=1, blocks_used=5, blocks_total=8, image_tokens_total=40, prefix_hits_total=9
        )
    )
    async with http(fake_app(engine, pool=pool)) as client:
        await client.post(CHAT, json=chat_body(n=2))
        await client.post(CHAT, json=chat_body(n=0))
        answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert found["sightline_requests_total", "chat", "completed"] == 1
    assert found["sightline_requests_total", "chat", "refused"] == 1
    assert found["sightline_requests_running",] == 3
    assert found["sightline_requests_waiting",] == 1
    assert (found["sightline_kv_blocks_used",], found["sightline_kv_blocks",]) == (5, 8)
    assert found["sightline_image_tokens_total",] == 40
    assert found["sightline_prefix_cache_hits_total",] == 9
    assert found["sightline_images_decoded_total",] == 6
    assert found["sightline_engine_restarts_total",] == 2
    assert found["sightline_time_to_first_token_seconds_count",] == 1
    assert found["sightline_inter_token_seconds_count",] == 2 * 3
    assert found["sightline_request_seconds_count",] == 1


async def test_two_apps_have_figures_of_their_own() -> None:
    async with http(fake_app()) as one, http(fake_app()) as other:
        await one.post(CHAT, json=chat_body())
        assert 'endpoint="chat"' not in (await other.get("/metrics")).text


async def test_the_openapi_document_is_truthful() -> None:
    document = fake_app(api_key=("k",)).openapi()
    chat = document["paths"][CHAT]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert set(chat["responses"]) == {"200", "4XX", "5XX"}
    assert set(document["components"]["schemas"]["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    assert "422" not in json.dumps(document)
    assert document["paths"]["/health"]["get"]["security"] == []
    assert chat["security"] == [{"key": []}]
    names = set(document["components"]["schemas"])
    references = set(_references(document))
    assert references <= {f"#/components/schemas/{name}" for name in names}, "no reference leads nowhere"


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    stream = io.StringIO()
    logs.configure(Settings(log_format="json"), stream)
    yield stream
    root.handlers[:] = before[0]
    root.setLevel(before[1])


async def test_K11_one_line_a_request_without_what_was_said(log_lines: io.StringIO) -> None:
    content = [{"type": "text", "text": "my secret prompt"}, fake_image("secret picture")]
    headers = {"Authorization": "Bearer sk-secret", "X-Request-Id": "req-7"}
    async with http(fake_app(FakeEngine("a secret answer"), api_key=("sk-secret",))) as client:
        body = chat_body(messages=[{"role": "user", "content": content}])
        await client.post(CHAT + "?api_key=sk-secret", json=body, headers=headers)
        await client.post(CHAT, json=body, headers={"Authorization": "Bearer other-secret"})
        await client.get("/health")
        await client.get("/a%1b[2Jb%0d%0ac%e2%80%ae", headers=headers)
    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    own = [line for line in lines if line["logger"] == "sightline_server.access"]
    assert [line["status"] for line in own] == [200, 401, 404]
    assert own[0]["request_id"] == "req-7"
    assert (own[0]["method"], own[0]["path"], own[0]["outcome"]) == ("POST", CHAT, "completed")
    assert own[0]["images"] == 1
    assert own[0]["completion_tokens"] == len("a secret answer") + 1
    assert own[0]["ms"] >= 0
    assert "secret" not in log_lines.getvalue()
    assert "\x1b" not in log_lines.getvalue()


def test_K10_text_lines_stay_one_line_each() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "a\r\nb\x1b[2J\x85\u2028\u202e\ud800 é", (), None)
    line = logs.TextLines().format(record)
    assert "\\u000d\\u000ab\\u001b[2J\\u0085\\u2028\\u202e" in line
    assert line.endswith("é")
    assert "\\ud800" in line
    assert line.isprintable()


def test_K10_a_field_cannot_be_forged(log_lines: io.StringIO) -> None:
    logs.configure(Settings(), log_lines)
    record = logs.RequestRecord("req-1", "GET", '/a status=200 outcome="completed"\r\nb', started=0.0)
    record.status = 404
    logs.log_request(record, 0.0015)
    (line,) = log_lines.getvalue().splitlines()
    assert line.endswith(
        r'request_id=req-1 method=GET path="/a status=200 outcome=\"completed\"\r\nb" status=404 outcome=refused ms=1.5'
    )


def test_the_app_starts_without_torch(repository: Path) -> None:
    code = (
        "import sys, sightline_server.app\n"
        "from fakes import fake_app\n"
        "fake_app().openapi()\n"
        "found = {'torch', 'transformers', 'torchvision', 'open_clip'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository / "tests", timeout=60)


def test_a_tokenizer_of_another_model_is_refused(demo_checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(demo_checkpoint_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 700
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"knows \d+ tokens, the model's vocab_size is 700"):
        ServedModel.load(folder, Settings())


def test_the_demo_model_as_the_api_sees_it(demo_checkpoint_folder: Path) -> None:
    model = ServedModel.load(demo_checkpoint_folder, Settings())
    assert model.names == ("sightline-demo",)
    assert model.max_model_len == model.config.decoder.max_position_embeddings
    assert model.preprocess.num_tokens == model.config.num_image_tokens
    named = ServedModel.load(demo_checkpoint_folder, Settings(served_model_name=("a", "b"), max_model_len=100))
    assert (named.names, named.max_model_len) == (("a", "b"), 100)
    with pytest.raises(SettingsError, match="--max-model-len 1000000"):
        ServedModel.load(demo_checkpoint_folder, Settings(max_model_len=1_000_000))
