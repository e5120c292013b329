"""Who may release the switch: names and the scrypt hashes of their approval codes, from a file or the environment.

Codes are compared here and nowhere else, in constant time and at the same cost whether the name or the code is wrong.
A hash takes 16 MiB and some 50 ms, so `verify` belongs in a thread, one at a time. What is approved, how often a wrong
code may be given, and when a changed file counts are not known here.
"""

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from sidecar.core.errors import ApprovalError
from sidecar.settings.problems import Path as KeyPath
from sidecar.settings.problems import Problem, SettingsProblems
from sidecar.settings.yaml_source import UNREADABLE, Document, read_file

MAX_CODE_BYTES: Final = 1024
"""Longest code in UTF-8: more than anybody types, little enough to hash at once."""

# One set of parameters for all: 2**14 * 8 * 128 bytes = 16 MiB, which fits the container beside everything else, and
# no name can be told from another by how long its answer takes.
_LOG_N: Final = 14
_R: Final = 8
_P: Final = 1
_PARAMETERS: Final = f"ln={_LOG_N},r={_R},p={_P}"
_SALT_BYTES: Final = 16
_HASH_BYTES: Final = 32
_MAX_NAME: Final = 128

_REFUSAL: Final = "the approval code is not that of this approver"
_NOBODY: Final = (
    "no approver is configured, so nobody can release the switch: set recovery.approvers_file, or give the sidecar "
    "KILL_SWITCH_APPROVAL_CODE, and restart it"
)
_ENVIRONMENT: Final = "KILL_SWITCH_APPROVAL_CODE"


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeHash:
    """A parsed `scrypt$ln=14,r=8,p=1$<salt>$<hash>`."""

    salt: bytes
    digest: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"scrypt${_PARAMETERS}${_base64(self.salt)}${_base64(self.digest)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Whose yes it was; `by_verified` is False where one shared code proves no name."""

    name: str
    by_verified: bool


def hash_code(code: str) -> str:
    """Hash a code under a fresh salt, as `scrypt$ln=14,r=8,p=1$<base64 salt>$<base64 hash>`.

    Raises:
        ValueError: the code is empty, longer than 1 KiB or holds a line break.
    """
    checked_code(code)
    salt = secrets.token_bytes(_SALT_BYTES)
    return str(CodeHash(salt=salt, digest=_scrypt(code, salt)))


def checked_code(code: str) -> str:
    """Return the code as it is.

    Raises:
        ValueError: it is empty, longer than 1 KiB or could not be typed as one line. The message never holds the code.
    """
    if not code:
        raise ValueError("the approval code is empty")
    if "\n" in code or "\r" in code:
        raise ValueError("the approval code holds a line break; it must be one line")
    length = len(_bytes(code))
    if length > MAX_CODE_BYTES:
        raise ValueError(f"the approval code has {length} bytes; at most {MAX_CODE_BYTES} are allowed")
    return code


def verify_code(code: str, hashed: str) -> bool:
    """Whether the code is the one that was hashed; compared byte for byte in UTF-8, in constant time.

    Raises:
        ValueError: `hashed` is no hash of ours.
    """
    return _matches(code, parse_hash(hashed))


def parse_hash(text: str) -> CodeHash:
    """Read a hash as `hash_code` writes it; other parameters are refused, for all answers must take the same time.

    Raises:
        ValueError: it is something else. The message never holds the text, which may be a code in the wrong place.
    """
    wanted = f"wanted scrypt${_PARAMETERS}$<salt>$<hash>, as `killswitch hash-code` prints it"
    parts = text.split("$")
    if len(parts) != 4 or parts[0] != "scrypt":
        raise ValueError(f"is not a hash of an approval code; {wanted}")
    if parts[1] != _PARAMETERS:
        raise ValueError(f"has the parameters {parts[1]!r}; {wanted}")
    try:
        salt, digest = (base64.b64decode(part, validate=True) for part in parts[2:])
    except (binascii.Error, ValueError):
        raise ValueError(f"has a salt or a hash that is not base64; {wanted}") from None
    if len(salt) != _SALT_BYTES or len(digest) != _HASH_BYTES:
        raise ValueError(
            f"has a salt of {len(salt)} and a hash of {len(digest)} bytes, "
            f"not {_SALT_BYTES} and {_HASH_BYTES}; {wanted}"
        )
    return CodeHash(salt=salt, digest=digest)


class Approvers:
    """The approvers in force. `verify` may run in another thread than `refresh`.

    A changed file counts only after `refresh`: whoever can write it must not become an approver of the very kill that
    stands, so the caller decides when.
    """

    def __init__(
        self, *, named: Mapping[str, CodeHash] | None = None, shared: CodeHash | None = None, path: Path | None = None
    ) -> None:
        self._named: Mapping[str, CodeHash] = MappingProxyType(dict(named or {}))
        self._shared = shared
        self._path = path
        self._seen: tuple[int, int, int, int] | None = None
        # What an unknown name is compared with; nobody knows a code for it.
        self._nobody = CodeHash(salt=secrets.token_bytes(_SALT_BYTES), digest=secrets.token_bytes(_HASH_BYTES))

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a YAML list of `{name, code_hash}`.

        Raises:
            SettingsProblems: with every problem of the file.
        """
        approvers = cls(path=Path(path))
        approvers.refresh()
        return approvers

    @classmethod
    def from_environment(cls, code: str | None) -> Self:
        """Take the one code of the environment, which proves no name; None or empty means that there is no approver.

        Only its hash is kept. A line break at its end is dropped: secrets are often made with one, and no prompt could
        ever give it.

        Raises:
            SettingsProblems: the code is longer than 1 KiB or has several lines.
        """
        code = (code or "").removesuffix("\n").removesuffix("\r")
        if not code:
            return cls()
        try:
            return cls(shared=parse_hash(hash_code(code)))
        except ValueError as error:
            raise SettingsProblems(
                [Problem(file="environment", line=1, key=_ENVIRONMENT, reason=f"cannot be used: {error}")]
            ) from None

    @property
    def count(self) -> int:
        """How many different people can approve; the shared code counts as one."""
        return len(self._named) + (self._shared is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the file, in its order; empty for the shared code."""
        return tuple(self._named)

    def lockout_name(self, by: str) -> str:
        """The name under which wrong codes are counted.

        With the shared code it is the same for every `by`, or a made-up name would bring five new attempts each.
        """
        return by if self._shared is None else f"({_ENVIRONMENT})"

    def changed(self) -> bool:
        """Whether the file is another one than was read, by its inode, size and time; also when it is gone."""
        return self._path is not None and _signature(self._path) != self._seen

    def refresh(self) -> bool:
        """Read the file again if it has changed; return whether it was read.

        Raises:
            SettingsProblems: with every problem of the file; who could approve before still can, and no one else.
        """
        if self._path is None:
            return False
        signature = _signature(self._path)
        if signature is not None and signature == self._seen:
            return False
        self._named = MappingProxyType(_read(self._path))
        self._seen = signature
        return True

    def verify(self, by: str, code: str) -> Verified:
        """Check a code; takes the time of one hash, whatever is wrong.

        Raises:
            ApprovalError: in the same words for an unknown name and a wrong code; other words where there is no
                approver at all.
        """
        named = self._named
        if not named and self._shared is None:
            raise ApprovalError(_NOBODY)
        hashed = self._shared or named.get(by) or self._nobody
        if not _matches(code, hashed):
            raise ApprovalError(f"{_REFUSAL}; nothing was released")
        return Verified(name=by, by_verified=self._shared is None)


def _matches(code: str, hashed: CodeHash) -> bool:
    given = code if len(_bytes(code)) <= MAX_CODE_BYTES else ""  # the empty code has no hash, and costs the same
    return hmac.compare_digest(_scrypt(given, hashed.salt), hashed.digest) and bool(given)


def _scrypt(code: str, salt: bytes) -> bytes:
    return hashlib.scrypt(_bytes(code), salt=salt, n=2**_LOG_N, r=_R, p=_P, dklen=_HASH_BYTES)


def _bytes(code: str) -> bytes:
    return code.encode("utf-8", "surrogatepass")  # JSON may carry half a pair; it is then simply a wrong code


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _signature(path: Path) -> tuple[int, int, int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - follows the symlinks by which Kubernetes swaps a secret
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> dict[str, CodeHash]:
    # No variables: what stands in the environment proves nothing about a person.
    document = read_file(path, {})
    problems = list(document.problems)
    named: dict[str, CodeHash] = {}
    if isinstance(document.data, list) and document.data:
        for index, entry in enumerate(document.data):
            problems.extend(_add(named, document, (index,), entry))
    elif document.data is not UNREADABLE:
        problems.append(document.problem((), "must be a list of {name, code_hash} with at least one approver"))
    if problems:
        raise SettingsProblems(problems)
    return named


def _add(named: dict[str, CodeHash], document: Document, at: KeyPath, entry: Any) -> Iterator[Problem]:
    if not isinstance(entry, dict):
        if entry is not UNREADABLE:
            yield document.problem(at, "must be a mapping with name and code_hash")
        return
    for key in entry.keys() - {"name", "code_hash"}:
        yield document.problem((*at, key), "is not a key of an approver; the keys are name and code_hash")
    name, hashed = entry.get("name"), entry.get("code_hash")
    reason = _name_fault(name, named)
    if reason and name is not UNREADABLE:
        yield document.problem((*at, "name"), reason)
    if hashed is UNREADABLE:
        return
    if not isinstance(hashed, str):
        yield document.problem((*at, "code_hash"), "is missing; make one with `killswitch hash-code`")
        return
    try:
        parsed = parse_hash(hashed)
    except ValueError as error:
        yield document.problem((*at, "code_hash"), str(error))
        return
    if not reason:
        named[str(name)] = parsed


def _name_fault(name: Any, named: Mapping[str, CodeHash]) -> str:
    if not isinstance(name, str) or not name.strip():
        return "is missing; write the approver's name"
    if not name.isprintable() or len(name) > _MAX_NAME or name != name.strip():
        return f"{name!r} is not a name: at most {_MAX_NAME} printable characters, without spaces at its ends"
    if name in named:
        return f"{name!r} is an approver already; each approver stands here once"
    return ""
