"""The keys file and `sightline keys`: what a person may write, what a program may write, what is never written."""

import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from sightline_server.auth.keyring import Keyring
from sightline_server.auth.keys_file import (
    KeysFileError,
    create_key,
    digest_of,
    read_keys_file,
    revoke_key,
)
from sightline_server.auth.principal import Limits, Scope
from sightline_server.cli.main import main
from sightline_server.settings import Settings, SettingsError

CHAT = (Scope.CHAT,)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def test_a_key_opens_what_its_line_says_until_it_is_revoked(file: Path) -> None:
    limits = Limits(requests_per_minute=3, megapixels_per_minute=0.5)
    entry, secret = create_key(file, "ann", (Scope.CHAT, Scope.FILES), limits)
    assert digest_of(secret).hex() == entry.sha256
    keyring = Keyring(Settings(keys_file=str(file)))
    ann = keyring.find(secret.encode())
    assert ann is not None
    assert (ann.key_id, ann.name, ann.scopes, ann.limits) == (entry.id, "ann", {"chat", "files"}, limits)
    assert len(ann.cache_salt) == 16
    assert revoke_key(file, "ann").id == entry.id
    assert keyring.find(secret.encode()) is not None, "only a reload takes it up"
    keyring.reload()
    assert keyring.find(secret.encode()) is None
    assert keyring.needs_key, "a file without a key in force closes the server"


def test_the_file_holds_no_key_and_is_its_owners_alone(file: Path) -> None:
    _, secret = create_key(file, "ann", CHAT, Limits())
    _, other = create_key(file, "bob", CHAT, Limits())
    text = file.read_text()
    assert secret not in text
    assert other not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name], "no temporary file is left"
    file.chmod(0o640)
    revoke_key(file, "bob")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_lines_that_are_not_concerned_stay_as_a_person_wrote_them(file: Path) -> None:
    create_key(file, "ann", CHAT, Limits())
    written = file.read_text()
    file.write_text("# ours\n\n  " + written.replace('"name":"ann"', '"name" :  "ann"').rstrip("\n"))
    before = file.read_text()
    create_key(file, "bob", CHAT, Limits())
    assert file.read_text().startswith(before + "\n{")
    revoke_key(file, "bob")
    assert file.read_text().startswith(before + "\n{")
    assert [(entry.name, bool(entry.revoked)) for entry in read_keys_file(file)] == [("ann", False), ("bob", True)]


def test_a_failed_write_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key(file, "ann", CHAT, Limits())
    before = file.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(KeysFileError, match="No space left"):
        create_key(file, "bob", CHAT, Limits())
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_writers_at_one_time_lose_nothing(file: Path) -> None:
    threads = [threading.Thread(target=create_key, args=(file, f"k{index}", CHAT, Limits())) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {entry.name for entry in read_keys_file(file)} == {f"k{index}" for index in range(16)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"id": "ann"}, "has no usable id"),
        ({"sha256": "AB" * 32}, "no usable sha256"),
        ({"name": ""}, "needs a name"),
        ({"name": "a\x1b[2Jb"}, "needs a name"),
        ({"name": " ann"}, "needs a name"),
        ({"scopes": []}, "opens nothing"),
        ({"scopes": ["root"]}, "invalid enum value 'root'"),
        ({"scopes": "chat"}, "expected 'array'"),
        ({"limits": {"requests_per_minute": 0}}, "requests_per_minute 0"),
        ({"limits": {"requests_per_minute": -1}}, "a limit is above 0"),
        ({"limits": {"requests_per_minute": 1.5}}, "expected 'int | null'"),
        ({"limits": {"megapixels_per_minute": 1e400}}, "out of range"),
        ({"limits": {"request_per_minute": 1}}, "unknown field 'request_per_minute'"),
        ({"scope": ["chat"]}, "unknown field 'scope'"),
        ({"revoked": None}, "expected 'str'"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(file: Path, changes: dict[str, object], told: str) -> None:
    create_key(file, "ann", CHAT, Limits())
    (line,) = file.read_text().splitlines()
    entry = msgspec.json.decode(line) | changes
    text = msgspec.json.encode(entry).decode() if changes.get("limits") != {"megapixels_per_minute": 1e400} else ""
    text = text or line.replace('"created"', '"limits":{"megapixels_per_minute":1e400},"created"')
    file.write_text(f"# keys\n{text}\n")
    file.chmod(0o600)
    with pytest.raises(KeysFileError) as caught:
        Keyring(Settings(keys_file=str(file)))
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"Line 2 of --keys-file {str(file)!r}")


def test_a_file_that_cannot_be_used_is_named(file: Path) -> None:
    settings = Settings(keys_file=str(file))
    with pytest.raises(SettingsError, match=r"does not exist\. 'sightline keys create' makes it"):
        Keyring(settings)
    create_key(file, "ann", CHAT, Limits())
    line = file.read_text()
    file.write_text(line + line)
    with pytest.raises(SettingsError, match=r"Lines 1 and 2 .* the same id"):
        Keyring(settings)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="no UTF-8"):
        Keyring(settings)
    file.write_text(line)
    file.chmod(0o620)
    with pytest.raises(SettingsError, match="chmod 600"):
        Keyring(settings)


def test_a_broken_file_keeps_the_keys_and_says_so_in_one_line(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, secret = create_key(file, "ann", CHAT, Limits())
    keyring = Keyring(Settings(keys_file=str(file)))
    file.write_text("{\n")
    keyring.reload()
    assert keyring.find(secret.encode()) is not None
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage().startswith("The keys stay as they were. Line 1 of --keys-file")
    assert "\n" not in record.getMessage()


def test_keys_of_the_settings_open_everything_and_have_an_id_that_is_no_key(file: Path) -> None:
    create_key(file, "ann", CHAT, Limits())
    keyring = Keyring(Settings(api_key=("word",), keys_file=str(file)))
    owner = keyring.find(b"word")
    assert owner is not None
    assert owner.scopes == set(Scope)
    assert owner.limits == Limits()
    again = Keyring(Settings(api_key=("other", "word"))).find(b"word")
    assert again == owner, "what is stored belongs to it after a restart too"
    assert keyring.num_keys == 2


# The command


def test_the_command_makes_lists_and_revokes(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGHTLINE_KEYS_FILE", str(file))
    flags = ["--scope", "chat", "--scope", "admin", "--requests-per-minute", "60", "--megapixels-per-minute", "2.5"]
    assert main(["keys", "create", "ann", *flags]) == 0
    made = capsys.readouterr()
    secret = made.out.strip()
    assert secret.startswith("sk-sightline-")
    assert secret not in made.err
    (entry,) = read_keys_file(file)
    assert entry.sha256 == digest_of(secret).hex()
    assert entry.limits == Limits(requests_per_minute=60, megapixels_per_minute=2.5)
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert entry.id in listed
    assert "chat,admin" in listed
    assert "requests/min 60, megapixels/min 2.5" in listed
    assert "in force" in listed
    assert secret not in listed
    assert entry.sha256 not in listed
    assert main(["keys", "revoke", entry.id]) == 0
    assert "kill -HUP" in capsys.readouterr().out
    assert main(["keys", "list"]) == 0
    assert "revoked 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["create", "ann"], "named 'ann' already"),
        (["create", "bob", "--tokens-per-minute", "0"], "'0' is no whole number above 0"),
        (["create", "bob", "--megapixels-per-minute", "nan"], "'nan' is no number above 0"),
        (["create", "bob", "--scope", "root"], "invalid choice: 'root'"),
        (["create", "b\nob"], "needs a name"),
        (["revoke", "bob"], "There is no key 'bob'"),
        (["revoke"], "KEY_ID"),
        ([], "ACTION"),
    ],
)
def test_the_commands_errors_say_what_would_do(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    create_key(file, "ann", CHAT, Limits())
    more = ["--keys-file", str(file)] if arguments else []
    try:
        status = main(["keys", *arguments, *more])
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert told in said.err
    assert len(read_keys_file(file)) == 1


def test_K11_a_key_given_by_mistake_is_not_repeated(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, secret = create_key(file, "ann", CHAT, Limits())
    assert main(["keys", "revoke", secret, "--keys-file", str(file)]) == 2
    said = capsys.readouterr()
    assert "That is a key" in said.err
    assert secret not in said.err + said.out


def test_without_a_file_the_command_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list"]) == 2
    assert "--keys-file FILE or set SIGHTLINE_KEYS_FILE" in capsys.readouterr().err
