"""What rules ask for without a kill, as it is stored: should one be gone at the next start, it holds all the same."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sidecar.core.document import Document, demands_document, demands_from_document
from sidecar.core.events import Demand


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One demand, and the type of the rule that made it.

    Attributes:
        demand: what was asked for.
        kind: the rule's type; None where an older version stored it, which did not say.
    """

    demand: Demand
    kind: str | None


def asked_document(asked: Iterable[Asked]) -> list[Document]:
    """The durable form."""
    known = tuple(asked)
    documents = demands_document(one.demand for one in known)
    return [{**document, "kind": one.kind} for document, one in zip(documents, known, strict=True)]


def asked_from_document(document: Iterable[Mapping[str, Any]]) -> tuple[Asked, ...]:
    """Read it back; raise StorageError where it cannot be read."""
    known = tuple(document)
    demands = demands_from_document(known)
    return tuple(Asked(demand=demand, kind=_kind(one)) for demand, one in zip(demands, known, strict=True))


def _kind(document: Mapping[str, Any]) -> str | None:
    kind = document.get("kind")
    return None if kind is None else str(kind)
