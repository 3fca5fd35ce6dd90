"""The keys in force: whose one is, and who is told when one is revoked.

Knows keys by their hashes, settings and the keys file. Knows no HTTP.
"""

import contextlib
import hashlib
import hmac
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from sightline_server.auth.keys_file import digest_of, read_keys_file
from sightline_server.auth.principal import Limits, Principal, Scope
from sightline_server.settings import Settings, SettingsError

log = logging.getLogger(__name__)


class Keyring:
    """Keys from the settings, which open everything and have no limits, and from the keys file, read again on demand.

    Raises SettingsError for what can't be read or for a key that no client could send.
    """

    def __init__(self, settings: Settings) -> None:
        self._share_caches = settings.share_caches
        self._file = Path(settings.keys_file) if settings.keys_file else None
        self._fixed = {digest_of(key): self._own(key) for key in plain_keys(settings)}
        self._principals = self._fixed | self._from_file()
        self._watchers: dict[str, set[Callable[[], None]]] = {}
        if self.needs_key and not self._principals:
            log.warning("--keys-file %r holds no key in force: every request will be refused.", str(self._file))

    @property
    def needs_key(self) -> bool:
        """Whether only keys open anything; a keys file closes the server even while no key stands in it."""
        return bool(self._fixed) or self._file is not None

    @property
    def num_keys(self) -> int:
        """Keys in force."""
        return len(self._principals)

    def find(self, secret: bytes) -> Principal | None:
        """Whose key this is."""
        digest = hashlib.sha256(secret).digest()
        # Digests of one length, and all of them compared, so that time tells nothing about any key.
        found = [owner for known, owner in self._principals.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def reload(self) -> None:
        """Read the keys file again. One that can't be used leaves the keys as they were, and an error in the log."""
        if self._file is None:
            return
        try:
            principals = self._fixed | self._from_file()
        except SettingsError as error:
            log.error("The keys stay as they were. %s", error)
            return
        before, self._principals = self._principals, principals
        gone = {owner.key_id for digest, owner in before.items() if digest not in principals}
        log.info("The keys file was read again: %d keys in force, %d no longer.", len(principals), len(gone))
        for key_id in gone:
            for revoked in tuple(self._watchers.get(key_id, ())):
                revoked()

    @contextlib.contextmanager
    def watch(self, principal: Principal, revoked: Callable[[], None]) -> Iterator[None]:
        """Call ``revoked`` when the principal's key is no longer in force, at once if it isn't."""
        watchers = self._watchers.setdefault(principal.key_id, set())
        watchers.add(revoked)
        try:
            if principal.key_id and all(owner.key_id != principal.key_id for owner in self._principals.values()):
                revoked()
            yield
        finally:
            watchers.discard(revoked)
            if not watchers:
                self._watchers.pop(principal.key_id, None)

    def _from_file(self) -> dict[bytes, Principal]:
        if self._file is None:
            return {}
        return {
            (digest := bytes.fromhex(entry.sha256)): Principal(
                entry.id, entry.name, frozenset(entry.scopes), entry.limits, self._salt(digest)
            )
            for entry in read_keys_file(self._file)
            if not entry.revoked
        }

    def _own(self, key: str) -> Principal:
        # Its id is logged, and an operator's key may be a mere word: guessing it from the id has to be slow.
        made = hashlib.scrypt(key.encode(), salt=b"sightline key id", n=2**12, r=8, p=1, dklen=16)
        return Principal(f"key_{made.hex()}", "operator", frozenset(Scope), Limits(), self._salt(digest_of(key)))

    def _salt(self, digest: bytes) -> bytes:
        return b"" if self._share_caches else hashlib.sha256(b"cache salt " + digest).digest()[:16]


def plain_keys(settings: Settings) -> tuple[str, ...]:
    """The keys that stand in the settings and in ``--api-key-file``. Raises SettingsError."""
    keys = list(settings.api_key)
    if settings.api_key_file:
        try:
            lines = Path(settings.api_key_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise SettingsError(
                f"--api-key-file {settings.api_key_file!r} can't be read as text. Check its owner and mode."
            ) from None
        found = [line.partition("#")[0].strip() for line in lines]
        keys += [key for key in found if key]
        if not any(found):
            raise SettingsError(f"--api-key-file {settings.api_key_file!r} holds no key: write one a line.")
    for index, key in enumerate(keys):
        if not key or any(character.isspace() or not character.isprintable() for character in key):
            raise SettingsError(f"API key number {index + 1} is empty or holds white space, which no client can send.")
    return tuple(dict.fromkeys(keys))
