"""`sightline serve` up to the moment it serves: flags, refusals, exit codes, the block of facts."""

import argparse
import logging
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sightline_server import settings as settings_table
from sightline_server.chat.decode_pool import DecodePool
from sightline_server.cli import serve
from sightline_server.cli.announce import LoadingProgress, ReadyServer
from sightline_server.cli.lifetime import ServeError, listen
from sightline_server.cli.main import COMMANDS, Parser, main
from sightline_server.engine.types import EngineInfo, Pace, Verification
from sightline_server.errors import ServerFault


@pytest.fixture(autouse=True)
def _keep_logging_and_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for row in settings_table.rows():
        monkeypatch.delenv(row.env, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def parse(*argv: str) -> dict[str, Any]:
    parser = Parser(prog="sightline")
    serve.add_parser(parser.add_subparsers())
    return vars(parser.parse_args(["serve", *argv]))


def exit_code(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as end:
        return int(end.code or 0)


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err), captured.err
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_every_setting_has_its_flag_and_nothing_else_does() -> None:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    text = subparser_help(parser)
    for row in settings_table.rows():
        assert row.section + ":" in text
    assert re.search(r"^  MODEL_DIR ", text, flags=re.MULTILINE)
    assert set(re.findall(r"^  (--[\w-]+)", text, flags=re.MULTILINE)) == {row.flag for row in settings_table.rows()}


def subparser_help(parser: argparse.ArgumentParser) -> str:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    text: str = action.choices["serve"].format_help()
    return text


def test_only_given_flags_are_passed_on() -> None:
    assert parse() == {}
    assert parse("--model", "/models/x") == parse("/models/x")
    assert parse("/models/x", "--port", "9", "--no-prefix-caching", "--deterministic") == {
        "model": "/models/x",
        "port": "9",
        "prefix_caching": "false",
        "deterministic": "true",
    }
    assert parse("--api-key", "a", "--api-key", "b,c")["api_key"] == ["a", "b,c"]


def test_flags_become_settings() -> None:
    settings = settings_table.load(
        parse("--api-key", "a", "--api-key", "b,c", "--dtype", "bfloat16", "--no-prefix-caching"), {}
    )
    assert settings.api_key == ("a", "b", "c")
    assert settings.dtype == "bfloat16"
    assert settings.prefix_caching is False


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["serve", "--port", "x"], "--port must be a whole number, not 'x'."),
        (["serve", "--port", "70000"], "--port must be at most 65535, not 70000."),
        (["serve", "--random-seed", str(2**64)], "--random-seed must be at most 1e+09, not 18446744073709551616."),
        (["serve", "--encoder-cache-mb", "inf"], "--encoder-cache-mb must be at most 1e+09, not inf."),
        (["serve", "--dtype", "int4"], "--dtype must be one of auto, float32, bfloat16, float16, not 'int4'."),
        (
            ["serve", "--device", "tpu"],
            "--device must be auto, cpu, cuda, cuda:N or a list such as cuda:0,cuda:1, not 'tpu'.",
        ),
        (["serve", "--prot", "8000"], "Unrecognized arguments: --prot. Run 'sightline --help' for help."),
        (["serve", "--port"], "Argument --port: expected one argument. Run 'sightline serve --help' for help."),
        (["serve", "/nowhere"], "MODEL_DIR '/nowhere' is no folder. Give the folder that holds config.json."),
        (["serve", "/nowhere", "--random", "tiny"], "A model folder and --random exclude each other: give one."),
        (
            ["serve", "--quantize-vision"],
            "--quantize-vision needs a scheme: add --quantize int8 or --quantize nf4.",
        ),
        (
            ["serve", "--random", "llava-70b"],
            "--random must be one of llava-1.5-7b, llava-1.5-13b, llava-110m, llava-45m, tiny, not 'llava-70b'.",
        ),
        (
            ["serve", "--api-key", "has space"],
            "API key number 1 is empty or holds white space, which no client can send.",
        ),
        (
            ["serve", "--max-model-len", "100000"],
            "--max-model-len 100000 is more than the 2048 positions of this checkpoint.",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*argv) == 2
    assert one_sentence(capsys).startswith(sentence.partition(" --prot ")[0])


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SIGHTLINE_MAX_QUEUE", "0")
    assert exit_code("serve") == 2
    assert one_sentence(capsys) == "SIGHTLINE_MAX_QUEUE must be at least 1, not 0."
    monkeypatch.delenv("SIGHTLINE_MAX_QUEUE")
    monkeypatch.setenv("SIGHTLINE_PROT", "1")
    assert exit_code("serve") == 2
    assert "SIGHTLINE_PROT is no setting" in one_sentence(capsys)


def test_a_folder_that_is_no_checkpoint_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("serve", str(tmp_path)) == 1
    assert "config.json is missing" in one_sentence(capsys)


def test_decoders_that_cannot_start_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoDecoders(DecodePool):
        async def start(self) -> None:
            raise ServerFault("An image decoder could not be started.")

    monkeypatch.setattr(serve, "DecodePool", NoDecoders)
    assert exit_code("serve", "--random", "tiny", "--port", "0") == 1
    assert one_sentence(capsys) == "An image decoder could not be started."


def test_the_dispatcher_lists_every_command_and_imports_only_the_asked_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^    {name} ", text, flags=re.MULTILINE), text
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"sightline {version('sightline')}\n"
    assert exit_code() == 2
    assert "COMMAND" in one_sentence(capsys)
    assert exit_code("server") == 2
    assert "serve" in one_sentence(capsys)

    script = "import sys; from sightline_server.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "print([name for name in ('torch', 'fastapi', 'sightline_server.cli.serve') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_serve_imports_no_torch() -> None:
    script = "import sys, sightline_server.cli.serve; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_listening_twice_on_a_port_is_refused_and_any_free_one_is_found() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port > 0
        with pytest.raises(ServeError, match=rf"^Port {port} on 127\.0\.0\.1 is in use .* --port\.$"):
            listen("127.0.0.1", port)
        # A client that comes early waits for its answer; it isn't turned away.
        with socket.create_connection(first.getsockname(), timeout=5):
            pass


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ServeError, match=r"^--host '192\.0\.2\.1' is no address of this machine\."):
        listen("192.0.2.1", 0)


def test_a_low_limit_of_open_files_is_raised_to_what_is_allowed() -> None:
    script = """
        import resource
        from sightline_server.cli.lifetime import allow_many_connections
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
        allow_many_connections()
        print(resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "(300, 300)\n", done.stderr


def ready_server(**changes: Any) -> ReadyServer:
    info = EngineInfo(
        device="cpu (x86_64, 2 threads)",
        dtype="float32",
        parameters=7_063_000_000,
        weight_bytes=28 * 2**30,
        num_blocks=1000,
        block_size=16,
        max_model_len=4096,
        load_seconds=1.0,
    )
    facts: dict[str, Any] = {
        "name": "llava",
        "architecture": "LlavaForConditionalGeneration",
        "checkpoint_dtype": "bfloat16",
        "asked_dtype": "auto",
        "tokens_per_image": 576,
        "info": info,
        "host": "127.0.0.1",
        "port": 8000,
        "needs_key": False,
    }
    return ReadyServer(**facts | changes)


def test_the_block_states_the_facts() -> None:
    block = ready_server().block()
    assert "llava (LlavaForConditionalGeneration, 7.06 billion parameters, 28 GiB)" in block
    assert "float32 (auto on a CPU: holds the checkpoint's bfloat16 exactly)" in block
    assert "16,000 tokens" in block
    assert "http://127.0.0.1:8000/v1" in block
    assert "not needed\n" in block
    assert "float32 (as --dtype float32 asks)" in ready_server(asked_dtype="float32").block()


def test_the_block_tells_what_the_check_of_the_weights_found() -> None:
    pace = Pace(weight_bytes=4 * 2**30, prompt_tokens_per_s=12_000.4, decode_tokens_per_s=51.0)
    whole = Pace(weight_bytes=13 * 2**30, prompt_tokens_per_s=15_000.0, decode_tokens_per_s=40.0)
    found = Verification(
        outcome="compared",
        message="",
        quantization="nf4",
        num_answers=8,
        num_positions=143,
        mean_kl=0.0123,
        worst_kl=0.5,
        top1_agreement=141 / 143,
        served=pace,
        unquantized=whole,
    )
    info = msgspec.structs.replace(ready_server().info, quantization="nf4", verification=found)
    assert (
        "  checked    nf4 against unquantized weights, 8 questions about drawn pictures\n"
        "             KL divergence 0.012 nats a token, 0.5 at worst\n"
        "             the same likeliest token at 141 of 143\n"
        "             nf4: 4 GiB, 12,000 prompt and 51 answer tokens/s alone in the engine\n"
        "             unquantized: 13 GiB, 15,000 prompt and 40 answer tokens/s alone in the engine\n"
    ) in ready_server(info=info).block()
    failed = Verification(outcome="failed", message="The check failed: planted.", quantization="nf4", served=pace)
    block = ready_server(info=msgspec.structs.replace(info, verification=failed)).block()
    assert (
        "  checked    The check failed: planted.\n"
        "             4 GiB, 12,000 prompt and 51 answer tokens/s alone in the engine\n"
    ) in block


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000/v1"),
        ("::", "http://[::1]:8000/v1"),
        ("fd00::5", "http://[fd00::5]:8000/v1"),
        ("models.lan", "http://models.lan:8000/v1"),
    ],
)
def test_the_address_is_one_a_client_can_use(host: str, url: str) -> None:
    server = ready_server(host=host)
    assert server.url == url
    assert url in server.curl_example()
    assert url in server.python_example()
    assert "whoever reaches this address" in server.block()


def test_progress_outside_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadingProgress() as progress:
        for percent in range(101):
            progress("loading weights", percent / 100)
        progress("sizing the cache", 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "loading weights",
        "loading weights: 25%",
        "loading weights: 50%",
        "loading weights: 75%",
        "loading weights: 100%",
        "sizing the cache",
    ]
