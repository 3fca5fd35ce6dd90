"""Who calls: the owner of a request and of whatever the server keeps for it.

Knows names, scopes and limits. Knows no key, no file and no HTTP.
"""

import enum
from dataclasses import dataclass

import msgspec


class Scope(enum.StrEnum):
    """What a key opens."""

    CHAT = "chat"
    FILES = "files"
    BATCHES = "batches"
    ADMIN = "admin"


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one key may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts, pictures' among them, and of answers."""
    images_per_minute: int | None = None
    megapixels_per_minute: float | None = None
    max_concurrent: int | None = None
    """Requests being answered at one time."""


@dataclass(frozen=True)
class Principal:
    """One key's owner, without the key."""

    key_id: str
    """Never changes and is never given again: what is stored belongs to it. Empty where no key is needed."""
    name: str
    scopes: frozenset[Scope]
    limits: Limits
    cache_salt: bytes
    """Principals with different salts share no cached prompt and no cached picture."""


ANONYMOUS = Principal("", "anonymous", frozenset(Scope), Limits(), b"")
"""Everybody, where no keys are configured."""
