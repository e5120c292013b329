"""The web page as the files that a browser gets: read once, served as they are, and all of them from here.

No build step and nothing from elsewhere: what stands in `static` is what runs. The page knows the API and no more than
any other client of it; who may do what is decided there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

_MEDIA_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
INDEX: Final = "index.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class PageFile:
    """One file of the page."""

    body: bytes
    media_type: str


def load() -> Mapping[str, PageFile]:
    """Read all files, by their names; raise OSError where the package is not whole."""
    found = {}
    for entry in files(__name__).joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get(entry.name[entry.name.rfind(".") :])
        if media_type is not None:
            found[entry.name] = PageFile(body=entry.read_bytes(), media_type=media_type)
    if INDEX not in found:
        raise FileNotFoundError(f"{INDEX} of the web page is missing from the package; install killswitch-sidecar anew")
    return found
