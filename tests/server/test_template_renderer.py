"""Strangers' chat templates in processes of their own: the same spans, and an end to every template that has none."""

import gc
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from text_checkpoints import write_text_checkpoint
from tracer import needs_stops

from sightline_models.chat_template import (
    MAX_EXTRA_CHARACTERS,
    VICUNA_TEMPLATE,
    ChatTemplate,
    ImagePart,
    Message,
    TextPart,
    TokenizerError,
)
from sightline_models.config import CheckpointError, read_config
from sightline_models.images import read_preprocess_config
from sightline_models.tokenizer import ChatTokenizer
from sightline_server.chat.decode_pool import DecodePool
from sightline_server.chat.model import ServedModel
from sightline_server.confined import template_renderer
from sightline_server.confined.template_renderer import TemplateRenderer
from sightline_server.settings import Settings, SettingsError

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROL = ("<s>", "</s>", "<image>", "<|end|>")
ECHO = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
# Does what follows only when a message says so: what is tried at load is well-behaved.
WHEN_TOLD = ECHO + "{% if messages[0].content[0].text == 'go' %}SPELL{% endif %}"
# Each doubles what it holds until nothing could hold it, or goes round longer than anyone waits.
NESTED_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(t='xxxxxxxx') %}{% for i in range(64) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "by filter": "{{ (''|attr('__class__')) + 1 }}",
    "by format": "{{ '{0.__class__.__mro__}'.format('') + 1 }}",
    "by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) + 1 }}",
    "by map": "{{ [''] | map(attribute='__class__') | list | first | upper + 1 }}",
    "code of a function": "{{ raise_exception.__code__.co_code }}",
    "frames": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "changing what it was given": "{{ messages.clear() }}",
}
BOMBS = {
    "repeating": "{{ 'a' * 1000 * 200000 }}",
    "nested loops": NESTED_LOOPS,
    "doubling": DOUBLING,
    "much text": "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "padding": "{{ 'x'.center(2000000000) }}",
    "formatting": "{{ '%1500000000d' % 1 }}",
    "a number": "{{ 9 ** 999 ** 999 }}",
    "a long number": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "lorem ipsum": "{{ lipsum(n=90000) }}",
}


@pytest.fixture(autouse=True)
def _little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on processor time, smaller, so that the tests wait less for what never ends."""
    monkeypatch.setattr(template_renderer, "CPU_S", 0.2)


def make(source: str) -> TemplateRenderer:
    return TemplateRenderer(source, NAMED, "<image>", CONTROL)


def user(*parts: str | None) -> Message:
    return Message("user", tuple(ImagePart() if part is None else TextPart(part) for part in parts))


@pytest.fixture
def renderer() -> TemplateRenderer:
    return make(VICUNA_TEMPLATE)


def of_process(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("template", [VICUNA_TEMPLATE, ECHO, "{{ messages[0].content }}"])
def test_spans_are_those_of_rendering_here(template: str) -> None:
    there, here = make(template), ChatTemplate(template, NAMED, "<image>", CONTROL)
    chats = [
        [user("Hi")],
        [user("</s> is <image> no token", "\n")],
        [user("  a\u0000b\u2028 '\"\\ {{ 7 * 7 }} 你好 é 👍\ud800 "), Message("assistant", (TextPart("x" * 70_000),))],
        [Message("system", (TextPart(""),)), user("</s>" * 30)],
    ]
    if template == VICUNA_TEMPLATE:
        chats.append([user(None, "Compare", None), Message("assistant", (TextPart("No"),)), user("Why?")])
    for chat in chats:
        assert there.render(chat) == here.render(chat)


def test_the_time_told_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    try:
        (span,) = make("{{ strftime_now('%Y-%m-%d %H') }}").render([user("x")])
        assert span.text == time.strftime("%Y-%m-%d %H")
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_templates_own_refusal_is_told_and_costs_no_process() -> None:
    renderer = make("{% if messages | length > 1 %}{{ raise_exception('One message, please.') }}{% endif %}" + ECHO)
    pids = renderer.process_ids()
    with pytest.raises(TokenizerError, match="One message, please"):
        renderer.render([user("a"), user("b")])
    assert renderer.render([user("a")])[0].text == "a"
    assert renderer.process_ids() == pids


@pytest.mark.parametrize("spell", ESCAPES.values(), ids=ESCAPES.keys())
def test_E15_the_sandbox_holds_at_load_and_in_requests(spell: str) -> None:
    with pytest.raises(TokenizerError, match="--chat-template"):
        make(spell)
    if "extends" not in spell and "import" not in spell:
        renderer = make(WHEN_TOLD.replace("SPELL", spell))
        with pytest.raises(TokenizerError, match="chat template"):
            renderer.render([user("go")])
        assert renderer.render([user("stay")])[0].text == "stay"


@pytest.mark.parametrize("spell", BOMBS.values(), ids=BOMBS.keys())
def test_E15_a_template_without_end_is_refused_at_load_and_ended_in_requests(spell: str) -> None:
    began, before = time.monotonic(), psutil.Process().memory_info().rss
    with pytest.raises(TokenizerError, match="--chat-template"):
        make(spell)
    renderer = make(WHEN_TOLD.replace("SPELL", spell))
    with pytest.raises(TokenizerError, match=r"chat template|limits of time and memory"):
        renderer.render([user("go")])
    assert renderer.render([user("stay")])[0].text == "stay"
    assert time.monotonic() - began < 60
    assert psutil.Process().memory_info().rss < before + (1 << 30)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}",
        "{{ " + "[" * 6000 + "]" * 6000 + " }}",
        "{{ " + "-" * 6000 + "1 }}",
        "{{ 1" + " + 1" * 30_000 + " }}",
        "{% if x %}" * 3000 + "{% endif %}" * 3000,
        "{% for x in y %}" * 300 + "{% endfor %}" * 300,
        "{{ x" + ".y" * 30_000 + " }}",
    ],
    ids=["parentheses", "lists", "signs", "sums", "ifs", "loops", "attributes"],
)
def test_E15_a_template_nested_without_measure_is_refused(source: str) -> None:
    with pytest.raises(TokenizerError, match="--chat-template"):
        make(source)


def test_E15_output_is_at_most_four_times_the_input_and_a_million() -> None:
    spell = "{% for i in range(COUNT) %}{{ 'x' * 1000 }}{% endfor %}"
    fits = make(WHEN_TOLD.replace("SPELL", spell.replace("COUNT", str(MAX_EXTRA_CHARACTERS // 1000))))
    assert sum(len(span.text) for span in fits.render([user("go")])) == MAX_EXTRA_CHARACTERS + 2
    beyond = make(WHEN_TOLD.replace("SPELL", spell.replace("COUNT", str(MAX_EXTRA_CHARACTERS // 1000 + 1))))
    with pytest.raises(TokenizerError, match=f"more than {MAX_EXTRA_CHARACTERS + 8} characters"):
        beyond.render([user("go")])


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=needs_stops)])
def test_E4_processes_that_are_gone_or_stopped_are_replaced(renderer: TemplateRenderer, number: signal.Signals) -> None:
    expected = renderer.render([user("Hi")])
    before = renderer.process_ids()
    for pid in before:
        os.kill(pid, number)
    began = time.monotonic()
    assert renderer.render([user("Hi")]) == expected
    assert time.monotonic() - began < 10
    assert set(renderer.process_ids()) != set(before)


def test_E15_a_process_that_answers_no_more_is_ended_within_its_time(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stopped ones stand for those that are busy without end.
    monkeypatch.setattr(template_renderer.process, "is_stopped", lambda pid: False)
    monkeypatch.setattr(template_renderer, "RENDER_S", 1.0)
    stopped = renderer.process_ids()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TokenizerError, match="limits of time and memory"):
        renderer.render([user("Hi")])
    assert 0.9 < time.monotonic() - began < 10
    assert not all(map(is_alive, stopped)), "the one that was asked is ended"
    monkeypatch.setattr(template_renderer, "RENDER_S", 20.0)
    assert renderer.render([user("Hi")])
    monkeypatch.setattr(template_renderer, "RENDER_S", 1.0)
    # A job larger than a pipe holds doesn't wait longer.
    for pid in renderer.process_ids():
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(TokenizerError, match="limits of time and memory"):
        renderer.render([user("x" * 500_000)])


class _Nonsense:
    """A process that says what it wants."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._answer


@pytest.mark.parametrize("answer", [None, 7, {"a": 1}, ["ab"], [["a", 1]], [[1, True]], [["a", True, False]]])
def test_E15_an_answer_of_another_form_is_no_answer(
    renderer: TemplateRenderer, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "_ask", _Nonsense(answer))
    with pytest.raises(TokenizerError, match="limits of time and memory"):
        renderer.render([user("Hi")])


def test_E15_more_text_than_was_allowed_is_no_answer(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renderer, "_ask", _Nonsense([["x" * (MAX_EXTRA_CHARACTERS + 9), False]]))
    with pytest.raises(TokenizerError, match="limits of time and memory"):
        renderer.render([user("Hi")])


def test_threads_share_the_processes(renderer: TemplateRenderer) -> None:
    texts = [f"question {number}" for number in range(40)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda text: renderer.render([user(text)]), texts))
    assert [spans[1].text for spans in made] == texts
    assert len(renderer.process_ids()) == 2


def test_its_processes_end_with_it(renderer: TemplateRenderer) -> None:
    mine = make(ECHO)
    pids = mine.process_ids()
    assert all(map(is_alive, pids))
    del mine
    gc.collect()
    assert not any(map(is_alive, pids))
    assert all(map(is_alive, renderer.process_ids()))


def test_its_processes_are_confined(renderer: TemplateRenderer) -> None:
    pid = renderer.process_ids()[0]
    for _ in range(2):
        renderer.render([user("Hi")])
    process = psutil.Process(pid)
    limits = {line[:26].strip(): line[26:].split()[0] for line in Path(f"/proc/{pid}/limits").read_text().splitlines()}
    assert int(limits["Max address space"]) == 512 << 20
    assert int(limits["Max cpu time"]) <= 3
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
    assert set(process.environ()) <= {"PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    mapped = Path(f"/proc/{pid}/maps").read_text()
    for unwanted in ("torch", "numpy", "pydantic", "tokenizers"):
        assert unwanted not in mapped
    assert process.memory_info().rss < 60_000_000


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_text_checkpoint(tmp_path, "Llama")
    return tmp_path


def test_the_server_renders_in_processes_and_nothing_else_does(checkpoint: Path, repository: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    model = ServedModel.load(checkpoint, Settings())
    started = [child for child in psutil.Process().children() if child.pid not in before]
    assert any("sightline_server.confined.template_worker" in child.cmdline() for child in started)
    here = ChatTokenizer.load(checkpoint, read_config(checkpoint))
    chat = [user(None, "What is </s> this?")]
    assert model.tokenizer.encode_chat(chat, [3]) == here.encode_chat(chat, [3])
    for file in (repository / "server").rglob("*.py"):
        text = file.read_text("utf-8")
        assert text.count("ChatTokenizer.load(") == text.count("make_template=TemplateRenderer)"), file
        assert "ChatTemplate(" not in text or file.name == "template_worker.py"


def test_E15_a_server_says_at_start_why_a_template_is_of_no_use(checkpoint: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(NESTED_LOOPS)
    with pytest.raises(TokenizerError, match=r"can't be compiled and tried within .* seconds.*--chat-template"):
        ServedModel.load(checkpoint, Settings(chat_template=str(template)))
    template.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        ServedModel.load(checkpoint, Settings(chat_template=str(template)))


def test_a_context_that_holds_no_chat_is_refused(checkpoint: Path) -> None:
    for length in (1, 2, 5):
        with pytest.raises(SettingsError, match=f"--max-model-len {length} leaves no room .* take [0-9]+"):
            ServedModel.load(checkpoint, Settings(max_model_len=length))
    needed = len(ChatTokenizer.load(checkpoint, read_config(checkpoint)).encode_chat([user("?")], []).token_ids)
    assert ServedModel.load(checkpoint, Settings(max_model_len=needed + 1)).max_model_len == needed + 1
    with pytest.raises(SettingsError):
        ServedModel.load(checkpoint, Settings(max_model_len=needed))


async def test_decoders_are_confined_alike(demo_checkpoint_folder: Path) -> None:
    preprocess = read_preprocess_config(demo_checkpoint_folder, read_config(demo_checkpoint_folder))
    pool = DecodePool(preprocess, workers=1, timeout_s=5, memory_mb=512, max_pixels=10**6)
    await pool.start()
    try:
        (pid,) = pool.worker_pids()
        assert "NoNewPrivs:\t1" in of_process(pid, "status")
        assert "Max file size             0 " in of_process(pid, "limits")
    finally:
        await pool.close()
