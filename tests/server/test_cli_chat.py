"""`sightline chat` against a small stub of /v1: what it sends, what it prints, and how it fails."""

import argparse
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from sightline_server.cli import chat
from sightline_server.cli.chat_client import ChatError, full_url
from sightline_server.cli.event_stream import read_events
from sightline_server.cli.pictures import PictureError, read_picture, split_paths, take_apart
from sightline_server.cli.terminal import clean, sendable


def chunk(text=None, *, finish=None, **more):
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice], **more}) + "\n\n"


def reply(*pieces, finish="stop", cached=0):
    usage = {
        "prompt_tokens": 40,
        "completion_tokens": len(pieces) + 1,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    last = "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\n"
    return [*(chunk(piece) for piece in pieces), chunk(finish=finish), last, "data: [DONE]\n\n"]


class Stub:
    """A /v1 of one model. ``replies`` are served in turn: a list of events (a float pauses), or (status, body)."""

    def __init__(self):
        self.replies = []
        self.asked = []
        self.headers = []
        self.models = (200, {"object": "list", "data": [{"id": "stub-1"}, {"id": "stub-2"}]})
        self.closed_early = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                stub.headers.append(dict(self.headers))
                self.answer(*stub.models) if self.path == "/v1/models" else self.answer(404, "nothing here")

            def do_POST(self):
                stub.headers.append(dict(self.headers))
                stub.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                planned = stub.replies.pop(0)
                if isinstance(planned, tuple):
                    self.answer(*planned)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for event in planned:
                        if isinstance(event, float):
                            self.pause(event)
                        else:
                            self.wfile.write(event.encode())
                except (BrokenPipeError, ConnectionResetError):
                    stub.closed_early.set()

            def pause(self, seconds):
                """Wait, unless the client leaves meanwhile."""
                if select.select([self.connection], [], [], seconds)[0]:
                    raise BrokenPipeError

            def answer(self, status, body, **headers):
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 503:
                    self.send_header("Retry-After", "7")
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


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


# Pictures named in a line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.JPG", "my cat.png", "it's.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "question", "names"),
    [
        ("what is this?", "what is this?", []),
        ("~/a.png what is this?", "what is this?", ["a.png"]),
        ("What is this? ~/a.png", "What is this?", ["a.png"]),
        ("what is in ~/a.png?", "what is in a.png?", ["a.png"]),
        ("compare a.png with ./b.JPG.", "compare a.png with b.JPG.", ["a.png", "b.JPG"]),
        ("'{root}/my cat.png' \"{root}/it's.webp\" which?", "which?", ["my cat.png", "it's.webp"]),
        ("{root}/my\\ cat.png", "", ["my cat.png"]),
        ("{root}/my cat.png", "", ["my cat.png"]),
        ("file://{root}/my%20cat.png", "", ["my cat.png"]),
        ("don't read notes.txt", "don't read notes.txt", []),
        ("a.png is `a name`", "is `a name`", ["a.png"]),
    ],
)
def test_take_apart(folder, line, question, names):
    parts = take_apart(line.replace("{root}", str(folder)))
    assert parts.question == question
    assert [path.name for path in parts.paths] == names
    assert all(path.is_file() for path in parts.paths)
    assert parts.missing == ()


@pytest.mark.parametrize(
    ("line", "missing"),
    [("~/gone.png?", ("~/gone.png?",)), ("`/gone.png` is text", ()), ("http://h/gone.png", ()), ("gone.png", ())],
)
def test_missing_pictures(folder, line, missing):
    assert take_apart(line).missing == missing


def test_split_paths_of_the_image_command(folder):
    assert [path.name for path in split_paths("a.png 'my cat.png' gone.png")] == ["a.png", "my cat.png", "gone.png"]
    assert [path.name for path in split_paths(f"{folder}/my cat.png")] == ["my cat.png"]
    assert split_paths("  ") == []


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


# At a terminal

LAUNCH = f"""{sys.executable} -c '
import argparse, sys
from sightline_server.cli import chat
parser = argparse.ArgumentParser()
chat.add_parser(parser.add_subparsers())
sys.exit(chat.run(parser.parse_args(["chat", "--url", *sys.argv[1:]])))'"""

AT_TERMINAL = """
import argparse, fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from sightline_server.cli import chat
parser = argparse.ArgumentParser()
chat.add_parser(parser.add_subparsers())
sys.exit(chat.run(parser.parse_args(["chat", *sys.argv[1:]])))
"""


class Terminal:
    """A person at a pseudo terminal: types, and waits for what should appear."""

    def __init__(self, *words, cwd):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = {**os.environ, "TERM": "xterm", "HOME": str(cwd), "INPUTRC": "/dev/null"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_TERMINAL, *words],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=cwd, env=environment,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def expect(self, pattern, timeout=20.0):
        """Wait until ``pattern`` appears in what came after the last match; returns what led up to its end."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} never appeared in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    data = b""
                assert data, f"ended before {pattern!r}: {self.seen!r}"
                self.seen += data.decode()
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text):
        os.write(self.master, text.encode())

    def end(self):
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], 10)[0] and os.read(self.master, 65536):
                pass
        return self.process.wait(timeout=20)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(stub, picture, tmp_path):
    person = Terminal("--url", stub.url, cwd=tmp_path)
    person.expect(r"stub-1 at .*\n")
    person.expect(r"> ")
    yield person
    person.close()


def test_a_whole_conversation(stub, terminal, tmp_path):
    stub.replies = [reply("Red."), reply("Still ", "\x1b[31mred."), (400, {"error": {"message": "Too long."}})]
    terminal.type("/image red.png\n")
    terminal.expect(r"attached red.png")
    terminal.expect(r"\[1 picture\] > ")
    terminal.type("What colour?\n")
    terminal.expect(r"Red\.\r\n")
    terminal.expect(r"2 tokens .* 0 of 40 prompt tokens cached")
    terminal.expect(r"> ")
    terminal.type("/system Be kind.\nAnd now?\n")
    shown = terminal.expect(r"red\.\r\n")
    assert "\x1b[31m" not in shown
    second = stub.asked[1]["messages"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[1]["content"][0]["type"] == "image_url"
    assert second[2]["content"] == "Red."
    terminal.type("third\n")
    terminal.expect(r"Too long\.")
    terminal.type("/images\n")
    terminal.expect(r"sent +red.png")
    terminal.type("/save talk.json\n")
    terminal.expect(r"Saved 2 turns")
    terminal.type("/save talk.json\n")
    terminal.expect(r"exists already")
    terminal.type("/help\n")
    terminal.expect(r"/clear.* start a new conversation")
    terminal.type("/nonsense\n")
    terminal.expect(r"no command /nonsense")
    terminal.expect(r"> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["model"] == "stub-1"
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]


def test_path_in_the_text_and_clear(stub, terminal):
    stub.replies = [reply("Red."), reply("Hello.")]
    terminal.type("What is in red.png?\n")
    terminal.expect(r"attached red.png")
    terminal.expect(r"Red\.\r\n")
    assert stub.asked[0]["messages"][0]["content"][1]["text"] == "What is in red.png?"
    terminal.type("./gone.png what?\n")
    terminal.expect(r"no file ./gone.png, so nothing was sent")
    terminal.type("/clear\nhello\n")
    terminal.expect(r"Hello\.\r\n")
    assert stub.asked[1]["messages"] == [{"role": "user", "content": "hello"}]
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_history_brings_a_line_back_and_tab_completes(stub, terminal):
    stub.replies = [reply("One."), reply("Two.")]
    terminal.type("first question\n")
    terminal.expect(r"One\.\r\n")
    terminal.expect(r"> ")
    terminal.type("\x1b[A\n")
    terminal.expect(r"Two\.\r\n")
    assert stub.asked[1]["messages"][-1]["content"] == "first question"
    terminal.type("/image re\t\n")
    terminal.expect(r"attached red.png")


def test_ctrl_c_stops_the_answer_and_closes_the_stream(stub, terminal):
    stub.replies = [[chunk("Once upon"), 30.0], reply("Fine.")]
    terminal.type("a story\n")
    terminal.expect(r"Once upon")
    terminal.type("\x03")
    terminal.expect(r"stopped")
    assert stub.closed_early.wait(10)
    terminal.expect(r"> ")
    terminal.type("go on\n")
    terminal.expect(r"Fine\.\r\n")
    assert [message["content"] for message in stub.asked[1]["messages"]] == ["a story", "Once upon", "go on"]
    terminal.expect(r"> ")
    # Between printing the prompt and waiting for keys, readline holds a Ctrl-C back until the next key.
    time.sleep(0.3)
    terminal.type("\x03")
    terminal.expect(r"Ctrl-D or /quit leaves")
    terminal.expect(r"> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_in_a_single_question_exits_130(stub, tmp_path):
    stub.replies = [[chunk("Once upon"), 30.0]]
    person = Terminal("--url", stub.url, "a story", cwd=tmp_path)
    try:
        person.expect(r"Once upon")
        os.killpg(person.process.pid, signal.SIGINT)
        assert person.end() == 130
        assert stub.closed_early.wait(10)
    finally:
        person.close()


def test_a_terminal_without_a_server(tmp_path):
    person = Terminal("--url", "127.0.0.1:9", cwd=tmp_path)
    try:
        person.expect(r"error: `sightline serve` is not running")
        assert person.end() == 1
    finally:
        person.close()
