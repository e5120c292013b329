"""Who may do what over TCP: names, roles and the SHA-256 of their tokens, from a file that is re-read when it changes.

Tokens are long random texts made by `killswitch hash-code --token`, so one plain hash is enough. A file that cannot be
used leaves the tokens of the last good one in force, says so, and lets nobody in who was not in before.
"""

import asyncio
import hashlib
import hmac
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from sidecar.settings.problems import Path as KeyPath
from sidecar.settings.problems import Problem, SettingsProblems
from sidecar.settings.yaml_source import UNREADABLE, Document, read_file

log = logging.getLogger("sidecar.operations")

_MAX_NAME: Final = 100
_READ_SECONDS: Final = 2.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = ("name", "roles", "sha256")


class Role(StrEnum):
    """What a token is for."""

    VIEWER = "viewer"
    WEBHOOK = "webhook"
    OPERATOR = "operator"
    RISK = "risk"

    @property
    def includes(self) -> frozenset["Role"]:
        """This role and all that come with it."""
        return _INCLUDES[self]


_INCLUDES: Final = {
    Role.VIEWER: frozenset({Role.VIEWER}),
    Role.WEBHOOK: frozenset({Role.WEBHOOK}),
    Role.OPERATOR: frozenset({Role.OPERATOR, Role.VIEWER}),
    Role.RISK: frozenset({Role.RISK, Role.OPERATOR, Role.VIEWER}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Somebody whom a credential proves.

    Attributes:
        name: whom the audit names.
        roles: as given.
    """

    name: str
    roles: frozenset[Role]

    def may(self, role: Role) -> bool:
        """Whether one of its roles is this one or includes it."""
        return any(role in own.includes for own in self.roles)


@dataclass(frozen=True, kw_only=True, slots=True)
class Token(Holder):
    """One entry of the file; `digest` is the SHA-256 of the token's text."""

    digest: bytes = field(repr=False)


class TokensFile:
    """The tokens in a file, as it is now.

    Args:
        path: the file; symlinks are followed, so that a swapped secret is seen.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._tokens: tuple[Token, ...] = ()
        self._seen: tuple[int, ...] | None = None
        self._reading = asyncio.Lock()
        self.problem: str | None = None
        """What is wrong with the file as it is now; None if nothing is."""

    async def holder(self, text: str) -> Token | None:
        """The entry whose token this is; None if nobody's. Compares with every entry, in constant time each."""
        await self.refresh()
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    async def refresh(self) -> None:
        """Read the file if it has changed. Never raises: see `problem`."""
        if self._signature() == self._seen and self._seen is not None:
            return
        async with self._reading:
            signature = self._signature()
            if signature is not None and signature == self._seen:
                return
            await self._read(signature)

    async def _read(self, signature: tuple[int, ...] | None) -> None:
        try:
            async with asyncio.timeout(_READ_SECONDS):
                self._tokens = await asyncio.to_thread(_read, self._path)
        except TimeoutError:
            self._report(f"{self._path}: could not be read within {_READ_SECONDS:g} s")
        except SettingsProblems as error:
            # The file is not read again until it changes: what is wrong with it stays wrong.
            self._seen = signature
            self._report(str(error))
        else:
            self._seen = signature
            self.problem = None

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            log.error("operations.tokens_unusable", extra={"fields": {"message": problem}})
        self.problem = problem

    def _signature(self) -> tuple[int, ...] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(path: Path) -> tuple[Token, ...]:
    # No variables: what stands in the environment is no secret of a person's.
    document = read_file(path, {})
    problems = list(document.problems)
    tokens: list[Token] = []
    if isinstance(document.data, list):
        for index, entry in enumerate(document.data):
            problems.extend(_add(tokens, document, (index,), entry))
    elif document.data is not UNREADABLE and not problems:
        problems.append(document.problem((), "must be a list of {name, roles, sha256}"))
    if problems:
        raise SettingsProblems(problems)
    return tuple(tokens)


def _add(tokens: list[Token], document: Document, at: KeyPath, entry: Any) -> Iterator[Problem]:
    if not isinstance(entry, dict):
        yield document.problem(at, "must be a mapping with name, roles and sha256")
        return
    faults = {key: "is not a key of a token; the keys are name, roles and sha256" for key in entry if key not in _KEYS}
    name, roles, digest = entry.get("name"), entry.get("roles"), entry.get("sha256")
    faults |= {
        key: fault
        for key, fault in (("name", _name_fault(name)), ("roles", _roles_fault(roles)), ("sha256", _hash_fault(digest)))
        if fault
    }
    if not faults:
        token = Token(name=str(name), roles=frozenset(map(Role, roles or ())), digest=bytes.fromhex(str(digest)))
        faults |= _clash(token, tokens)
        tokens.append(token)
    for key, fault in faults.items():
        yield document.problem((*at, key), fault)


def _name_fault(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        return "is missing; write whose token it is"
    if len(name) > _MAX_NAME or not name.isprintable() or name != name.strip():
        return f"{name!r} is not a name: at most {_MAX_NAME} printable characters, without spaces at its ends"
    return ""


def _roles_fault(roles: Any) -> str:
    if not isinstance(roles, list) or not roles:
        return f"must be a list with at least one of {', '.join(Role)}"
    strangers = [role for role in roles if role not in list(Role)]
    return f"{strangers[0]!r} is not a role; the roles are {', '.join(Role)}" if strangers else ""


def _hash_fault(digest: Any) -> str:
    # What stands here may be the token itself, in the wrong place: it is never shown.
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        return "must be 64 lowercase hexadecimal digits, as `killswitch hash-code --token` prints them"
    return ""


def _clash(token: Token, tokens: list[Token]) -> dict[str, str]:
    for other in tokens:
        if other.name == token.name:
            return {"name": f"{token.name!r} has a token already; give each token its own name"}
        if other.digest == token.digest:
            return {"sha256": f"is also that of {other.name!r}; a token belongs to one name"}
    return {}
