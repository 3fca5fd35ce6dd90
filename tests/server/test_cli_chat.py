"""`sightline chat` against a stub of /v1: what it sends, what it prints in a pipe, and how it fails."""

import argparse
import io
import subprocess
import sys

import pytest
from chat_stub import Stub, chunk, reply
from PIL import Image

from sightline_server.cli import chat
from sightline_server.cli.chat_client import ChatError, full_url
from sightline_server.cli.event_stream import read_events
from sightline_server.cli.pictures import PictureError, read_picture
from sightline_server.cli.terminal import clean, sendable


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def arguments(*words):
    parser = argparse.ArgumentParser()
    chat.add_parser(parser.add_subparsers())
    return parser.parse_args(["chat", *words])


def run_chat(*words):
    return chat.run(arguments(*words))


LAUNCH = f"""{sys.executable} -c '
import argparse, sys
from sightline_server.cli import chat
parser = argparse.ArgumentParser()
chat.add_parser(parser.add_subparsers())
sys.exit(chat.run(parser.parse_args(["chat", "--url", *sys.argv[1:]])))'"""


# One question


def test_answer_only_on_stdout_and_the_request_as_asked(stub, picture, capsys):
    stub.replies = [reply(" A red", " square.")]
    code = run_chat(
        "--url", stub.url, "--image", str(picture), "--system", "Be brief.", "--temperature", "0", "--max-tokens", "9",
        "What is it?",
    )  # fmt: skip
    assert code == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("A red square.\n", "")
    body = stub.asked[0]
    assert body["model"] == "stub-1"
    assert body["temperature"] == 0
    assert body["max_completion_tokens"] == 9
    assert body["stream"] is True
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    image, text = body["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert text == {"type": "text", "text": "What is it?"}


def test_sampling_is_the_servers_unless_asked_for(stub):
    stub.replies = [reply("x")]
    run_chat("--url", stub.url, "--model", "other", "q")
    assert set(stub.asked[0]) == {"model", "messages", "stream", "stream_options"}
    assert stub.asked[0]["model"] == "other"


def test_question_from_standard_input(stub, monkeypatch, capsys):
    stub.replies = [reply("yes")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is it?\n"))
    assert run_chat("--url", stub.url) == 0
    assert stub.asked[0]["messages"] == [{"role": "user", "content": "Is it?"}]
    assert capsys.readouterr().out == "yes\n"


def test_no_question_is_refused(stub, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert run_chat("--url", stub.url) == 1
    assert "no question" in capsys.readouterr().err


def test_a_path_in_a_piped_question_is_not_read(stub, picture, monkeypatch):
    stub.replies = [reply("ok")]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Summarize: look at {picture}"))
    run_chat("--url", stub.url)
    assert stub.asked[0]["messages"][0]["content"] == f"Summarize: look at {picture}"


def test_control_characters_never_reach_the_terminal(stub, capsys):
    stub.replies = [reply("a\x1b[2J", "b\x07\x9b31m\r\n\tc\x00", "\u202ed\ud800")]
    assert run_chat("--url", stub.url, "q") == 0
    assert capsys.readouterr().out == "a[2Jb31m\n\tcd\ufffd\n"


def test_control_characters_in_an_error_are_stripped(stub, capsys):
    stub.replies = [(400, {"error": {"message": "bad \x1b]0;owned\x07 thing"}})]
    assert run_chat("--url", stub.url, "q") == 1
    assert capsys.readouterr().err == "error: bad ]0;owned thing\n"


# Failures read as sentences


def test_no_server_says_how_to_start_one(capsys):
    assert run_chat("--url", "http://127.0.0.1:9/v1", "q") == 1
    err = capsys.readouterr().err
    assert "`sightline serve` is not running at http://127.0.0.1:9/v1" in err
    assert "sightline serve --port 9" in err


@pytest.mark.parametrize(("flags", "hint"), [((), "give --api-key KEY"), (("--api-key", "no"), "check --api-key")])
def test_401_names_the_flag(stub, capsys, flags, hint):
    stub.models = (401, {"error": {"message": "Incorrect API key."}})
    assert run_chat("--url", stub.url, *flags, "q") == 1
    assert hint in capsys.readouterr().err


def test_key_is_sent_as_a_bearer(stub):
    stub.replies = [reply("x")]
    run_chat("--url", stub.url, "--api-key", "k1", "q")
    assert all(headers["Authorization"] == "Bearer k1" for headers in stub.headers)


@pytest.mark.parametrize(
    ("planned", "sentence"),
    [
        ((400, {"error": {"message": "temperature must be at most 2."}}), "temperature must be at most 2."),
        ((503, {"error": {"message": "The engine is loading."}}), "The engine is loading. Try again in 7 s."),
        ((502, "<html>bad gateway</html>"), "HTTP status 502"),
        ([chunk("so "), 'data: {"error": {"message": "The engine restarted."}}\n\n'], "The engine restarted."),
        ([chunk("so far")], "ended before the answer did"),
        (["data: nonsense\n\n"], "doesn't speak the OpenAI chat API"),
        (['data: {"choices": 7}\n\n'], "doesn't speak the OpenAI chat API"),
    ],
)
def test_server_errors(stub, capsys, planned, sentence):
    stub.replies = [planned]
    assert run_chat("--url", stub.url, "q") == 1
    assert sentence in capsys.readouterr().err


def test_wrong_url_hints_at_v1(stub, capsys):
    assert run_chat("--url", stub.url.replace("/v1", "/api"), "q") == 1
    assert "Does --url lack /v1?" in capsys.readouterr().err


def test_reader_that_leaves_is_no_error(stub):
    stub.replies = [["" if i % 2 else chunk("word " * 4000) for i in range(40)] + reply("end")]
    ask = f"{LAUNCH} {stub.url!r} q | head -c 10"
    done = subprocess.run(["sh", "-c", ask], capture_output=True, timeout=60)
    assert done.stdout == b"word word "
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "There is no file"), (b"", "is empty"), (b"hello", "no PNG, JPEG")]
)
def test_unreadable_picture_is_named(stub, tmp_path, capsys, content, sentence):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    assert run_chat("--url", stub.url, "--image", str(path), "q") == 1
    err = capsys.readouterr().err
    assert "x.png" in err
    assert sentence in err
    assert not stub.headers, "nothing may be sent before all pictures are read"


def test_folder_as_picture(tmp_path):
    with pytest.raises(PictureError, match="is a folder"):
        read_picture(tmp_path)


# The address


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/api/v1/", "https://h/api/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
    ],
)
def test_full_url(typed, meant):
    assert full_url(typed) == meant


@pytest.mark.parametrize("typed", ["", "http://", "ftp://h", "http://h:x", "http://h:99999"])
def test_no_address(typed):
    with pytest.raises(ChatError, match="no address"):
        full_url(typed)


def test_environment_of_the_server_is_the_default(stub, monkeypatch):
    stub.replies = [reply("x")]
    monkeypatch.setenv("SIGHTLINE_PORT", stub.url.split(":")[2].removesuffix("/v1"))
    monkeypatch.setenv("SIGHTLINE_HOST", "0.0.0.0")
    monkeypatch.setenv("SIGHTLINE_API_KEY", "from-env")
    assert run_chat("q") == 0
    assert stub.headers[0]["Authorization"] == "Bearer from-env"


def test_key_from_the_environment_stays_at_home(stub, monkeypatch):
    stub.replies = [reply("x")]
    monkeypatch.setenv("SIGHTLINE_API_KEY", "from-env")
    assert run_chat("--url", stub.url, "q") == 0
    assert "Authorization" not in stub.headers[0]


# The wire


def test_events_survive_any_cut():
    stream = ': hi\ndata: {"a": "\u2028é"}\r\n\r\nevent: x\ndata: 1\ndata: 2\n\ndata:last'.encode()
    whole = ['{"a": "\u2028é"}', "1\n2", "last"]
    for size in (1, 2, 3, 7, len(stream)):
        assert list(read_events(stream[i : i + size] for i in range(0, len(stream), size))) == whole


def test_clean_keeps_ordinary_text():
    text = "naïve\tcafé\n日本語 עברית 👩\u200d👧 \u200f."
    assert clean(text) == text
    assert sendable(text) == text
    assert sendable("a\udce9b") == "a\ufffdb"
