"""A stranger's folder: links that stay inside, files of bearable size, JSON that ends, nothing that asks for code."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from text_checkpoints import write_text_checkpoint

from sightline_models import checkpoint_folder, safetensors_files, tokenizer
from sightline_models.checkpoint_files import read_entries
from sightline_models.checkpoint_folder import CheckpointError, find_file, read_object, read_settings
from sightline_models.config import read_config, read_generation_defaults
from sightline_models.images import read_preprocess_config
from sightline_models.tiny import write_checkpoint
from sightline_models.tokenizer import ChatTokenizer, TokenizerError

DEMO_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path, demo_checkpoint_folder: Path) -> Path:
    """A copy of the demo checkpoint's files."""
    made = tmp_path / "model"
    shutil.copytree(demo_checkpoint_folder, made)
    return made


def read_all(folder: Path) -> None:
    config = read_config(folder)
    read_generation_defaults(folder, config)
    read_preprocess_config(folder, config)
    ChatTokenizer.load(folder, config)
    read_entries(folder)


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize("name", DEMO_FILES)
def test_E14_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name} is a link that leads out"):
        read_all(folder)


@pytest.mark.parametrize("name", DEMO_FILES)
def test_E14_what_is_no_file_is_not_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    # Whoever opened this to read would wait for ever.
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"):
        read_all(folder)


def test_links_within_the_folder_and_into_a_caches_blobs_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "config.json").rename(folder / "parts" / "config.json")
    (folder / "config.json").symlink_to(Path("parts/config.json"))
    read_all(folder)
    cache = tmp_path / "models--someone--something"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0a1b2c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    read_all(snapshot)
    # The folder itself may be reached by a link.
    (tmp_path / "linked").symlink_to(snapshot)
    read_all(tmp_path / "linked")
    # Another folder beside snapshots, or beyond, is none of the cache's.
    for target in (Path("../../refs"), Path("../../../blobs")):
        (snapshot / target).mkdir()
        shutil.copy(folder / "config.json", snapshot / target / "file")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target / "file")
        with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
            read_all(snapshot)


def test_a_link_to_nothing_is_a_file_that_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("nothing")
    assert find_file(folder, "config.json") is None
    with pytest.raises(CheckpointError, match="is missing"):
        read_config(folder)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("config.json", "MAX_JSON_BYTES"),
        ("processor_config.json", "MAX_JSON_BYTES"),
        ("tokenizer_config.json", "MAX_JSON_BYTES"),
        ("tokenizer.json", "MAX_TOKENIZER_BYTES"),
        ("chat_template.jinja", "MAX_TEMPLATE_BYTES"),
    ],
)
def test_E13_files_have_a_size_they_may_have(folder: Path, name: str, bound: str) -> None:
    most = getattr(checkpoint_folder, bound)
    with (folder / name).open("ab") as stream:
        stream.truncate(most + 1)
    with pytest.raises(CheckpointError, match=f"{name} has more than {most} bytes"):
        read_all(folder)


def test_a_template_inside_another_file_has_a_bound_too(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json(folder / "processor_config.json", chat_template="x" * 1_000_001)
    with pytest.raises(TokenizerError, match=r"more than 1000000 characters.*--chat-template"):
        read_all(folder)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[" * 300_000, "nested too deep"),
        (b'{"a":' * 300_000, "nested too deep"),
        (b"{" + b'"\xff": 1}', "not UTF-8"),
        (b"[]", "must hold a JSON object, not a list"),
        (b"", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_E13_json_that_is_none_is_refused_in_a_sentence(folder: Path, name: str, content: bytes, sentence: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}.* {sentence}"):
        read_all(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"text_config": {"num_hidden_layers": 10**9}},
        {"vision_config": {"num_hidden_layers": 10**9}},
        {"text_config": {"hidden_size": 10**30}},
        {"text_config": {"rms_norm_eps": float("nan")}},
        {"text_config": {"rope_theta": float("inf"), "rope_parameters": None}},
        {"text_config": {"rms_norm_eps": 10**400}},
    ],
)
def test_E13_numbers_beyond_any_model_are_refused(folder: Path, field: dict[str, dict[str, Any]]) -> None:
    ((section, values),) = field.items()
    content = json.loads((folder / "config.json").read_text("utf-8"))
    content[section] |= values
    (folder / "config.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match=f"{section}.* it must be") as caught:
        read_config(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "values", "place"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, r"text_config\.auto_map"),
        ("config.json", {"text_config": {"inner": [{"trust_remote_code": 1}]}}, r"inner\.0\.trust_remote_code"),
        ("config.json", {"custom_pipelines": {"chat": {"impl": "x.Y"}}}, "custom_pipelines"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "x.Y"}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "auto_map"),
        ("generation_config.json", {"trust_remote_code": True}, "trust_remote_code"),
    ],
)
def test_E14_whoever_asks_for_code_is_refused(folder: Path, name: str, values: dict[str, Any], place: str) -> None:
    (folder / name).touch()
    if not (folder / name).read_bytes():
        (folder / name).write_text("{}")
    change_json(folder / name, **values)
    with pytest.raises(CheckpointError, match=f"{name}: .*{place}: .*never done"):
        read_all(folder)


def test_a_flag_that_denies_asks_for_nothing(folder: Path) -> None:
    change_json(folder / "config.json", trust_remote_code=False, auto_map=None)
    read_all(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.update(added_tokens=7),
        lambda spec: spec.update(added_tokens=[{"id": 4}]),
        lambda spec: spec.update(added_tokens=["<image>"]),
        lambda spec: spec.pop("model"),
        lambda spec: spec.update(model={"type": "BPE", "vocab": 3, "merges": []}),
        lambda spec: spec.update(decoder=[]),
        lambda spec: spec.update(decoder={"type": "Sequence", "decoders": 5}),
        lambda spec: spec["model"].update(merges=[["one"]]),
    ],
)
def test_E13_a_tokenizer_of_another_form_is_refused_in_a_sentence(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object]
) -> None:
    write_text_checkpoint(tmp_path, "Llama")
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spoil(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path, read_config(tmp_path))


class _Trap:
    """Whoever unpickles this makes the file named in it."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self._canary,))


# Reads and loads each folder as the server does, and tells of every pickle, program and module of a folder's own.
_LOAD = """
import sys
from pathlib import Path
import torch
from sightline_models.weights import load_vlm
from sightline_server.chat.model import ServedModel
from sightline_server.settings import Settings

seen = []

def watch(event, args):
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append(event)
    elif event == "subprocess.Popen" and "sightline_server.confined.template_worker" not in args[1]:
        seen.append(f"{event} {args[1]}")
    elif event in ("import", "open", "compile", "exec") and "/traps-" in repr(args[:2]):
        if event != "open" or Path(args[0]).suffix not in (".json", ".jinja", ".safetensors"):
            seen.append(f"{event} {args}")

sys.addaudithook(watch)
sys.audit("pickle.find_class", "so that the hook is seen to hear", "")
for argument in sys.argv[1:]:
    folder = Path(argument)
    try:
        model = ServedModel.load(folder, Settings())
        load_vlm(folder, model.config, model.preprocess.normalization, dtype=torch.float32, device=torch.device("cpu"))
        print("loaded")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
print(seen)
"""


def lay_traps(folder: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.ckpt", "optimizer.pth", "extra.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Trap(canary)))
    code = f"open({str(canary)!r}, 'w')\n"
    for name in ("modeling_evil.py", "sitecustomize.py", "torch.py", "tokenization_evil.py", "jinja2.py", "json.py"):
        (folder / name).write_text(code)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')


def load_apart(folders: Sequence[Path], *flags: str) -> list[str]:
    """What loading each folder said, and in the last line what the hook heard."""
    # Started in a folder of traps, so that a module of it would win if the current folder counted.
    command = [sys.executable, "-P", *flags, "-c", _LOAD, *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folders[0], timeout=150)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


_SPOILED: tuple[tuple[Callable[[Path], object], str], ...] = (
    (lambda folder: (folder / "model.safetensors").unlink(), "pickle"),
    (lambda folder: change_json(folder / "config.json", auto_map={"AutoModel": "modeling_evil.X"}), "never done"),
    (lambda folder: change_json(folder / "config.json", trust_remote_code=True), "never done"),
    (lambda folder: (folder / "config.json").rename(folder / "config.py"), "missing"),
    (lambda folder: os.truncate(folder / "model.safetensors", 4000), "not a whole safetensors file"),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"), "--chat-template"),
)


@pytest.mark.parametrize("flags", [(), ("-O",)], ids=["plain", "without asserts"])
def test_E13_E14_folders_full_of_traps_are_loaded_or_refused_and_no_trap_is_touched(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder, canary = tmp_path / "traps-0", tmp_path / "canary"
    write_checkpoint(folder)
    lay_traps(folder, canary)
    folders = [folder]
    for number, (spoil, _) in enumerate(_SPOILED, 1):
        folders.append(tmp_path / f"traps-{number}")
        shutil.copytree(folder, folders[-1])
        spoil(folders[-1])
    loaded, *refused, heard = load_apart(folders, *flags)
    assert loaded == "loaded"
    for said, (_, sentence) in zip(refused, _SPOILED, strict=True):
        assert said.startswith(("CheckpointError: ", "TokenizerError: "))
        assert sentence in said
    assert heard == "['pickle.find_class']"
    assert not canary.exists()
    # The trap is one: a reader of pickles falls into it.
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists()


def test_no_check_of_what_strangers_make_is_an_assert() -> None:
    for module in (checkpoint_folder, safetensors_files):
        assert "assert " not in Path(str(module.__file__)).read_text("utf-8")
    assert tokenizer.__file__
    with pytest.raises(CheckpointError):
        read_settings(Path("/nowhere"))
    with pytest.raises(CheckpointError):
        read_object(Path("/nowhere"))
