"""What the documents point to exists: links, headings, and every command line that they show."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sidecar.cli.kubectl import kubectl_killswitch
from sidecar.cli.main import killswitch

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("README.md")])

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`]*`")
_FENCE = re.compile(r"^(```+|~~~+)\s*(\w*)")
_SPAN = re.compile(r"`((?:kubectl )?killswitch [^`]*)`")
_COMMAND = re.compile(r"(?:^|\s)((?:kubectl )?(?<!-c )killswitch(?:\s.*)?$)")
# What a shell or a reader ends a command with; placeholders of a usage line are no command line.
_END = re.compile(r"\s(?:\||<|>|>>|2>|&&|;|;\s*.*)(?:\s|$)|;(?:\s|$)|\s#\s")
_USAGE = re.compile(r"[\[\]…]|\.\.\.")


def lines(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """Number, text, and the language of the fenced block a line is in (None outside of one)."""
    language: str | None = None
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(text.strip())
        if fence is not None:
            language = (fence[2] or "plain") if language is None else None
            continue
        yield number, text, language


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for _, text, language in lines(page):
        if language is not None or not re.match(r"#{1,6} ", text):
            continue
        heading = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", text.lstrip("#").strip())
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = found[slug] = found.get(slug, -1) + 1
        if count:
            found[f"{slug}-{count}"] = 0
    return set(found)


def broken_links(page: Path) -> Iterator[str]:
    for number, text, language in lines(page):
        if language is not None:
            continue
        for first, second in _LINK.findall(_CODE.sub("", text)):
            target = first or second
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists():
                yield f"{page.relative_to(ROOT)}:{number}: {target}: there is no {file}"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                yield f"{page.relative_to(ROOT)}:{number}: {target}: no such heading; there are {sorted(anchors(file))}"


def command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of code blocks, and what sentences name; of the latter, options that must be given may be left out."""
    waiting = ""
    for number, text, language in lines(page):
        if language is None:
            yield from ((number, span) for span in _SPAN.findall(text) if not _USAGE.search(span))
            continue
        if language not in {"sh", "bash", "console"}:
            continue
        text = waiting + text.strip()
        waiting = text[:-1] if text.endswith("\\") else ""
        command = _COMMAND.search(text.removeprefix("$ "))
        shown = not waiting and not text.startswith("#") and (language != "console" or text.startswith("$ "))
        if command is not None and shown and not re.search(r"\[-|…", text):
            yield number, command[1]


def parse(line: str) -> None:
    """Have click read a command line as it would before running it."""
    words = shlex.split(_END.split(f"{line} ")[0], comments=True)
    if words[0] == "kubectl":
        outer = kubectl_killswitch.make_context("kubectl killswitch", words[2:])
        words = ["killswitch", *outer.params["arguments"]]
    command: click.Command = killswitch
    context: click.Context | None = None
    rest = words[1:]
    while True:
        context = command.make_context(command.name, rest, parent=context)
        if not isinstance(command, click.Group):
            return
        rest = [*context._protected_args, *context.args]
        if not rest and command.invoke_without_command:
            return
        _, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_of_a_page_is_one_that_the_program_understands(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for number, line in command_lines(page):
        try:
            parse(line)
        except click.exceptions.Exit:
            continue  # --help and --version
        except (click.MissingParameter, click.BadOptionUsage) as error:
            if f"`{line}`" not in page.read_text(encoding="utf-8"):
                wrong.append(f"{page.relative_to(ROOT)}:{number}: {line}: {error}")
        except (click.ClickException, ValueError) as error:
            wrong.append(f"{page.relative_to(ROOT)}:{number}: {line}: {error}")
    assert wrong == []


def test_command_lines_are_found_and_a_wrong_one_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `killswitch status -o json`, in words `killswitch trigger [--by NAME]`.\n\n```sh\n"
        'kubectl exec -it POD -c killswitch -- \\\n  killswitch trigger --reason "a b" --by ann   # now\n'
        "echo code | killswitch recover --reason x --by bob < code.txt\nkubectl killswitch -A status\n```\n\n"
        "```text\nkillswitch is no command here\n```\n"
    )
    found = [line for _, line in command_lines(page)]
    assert found == [
        "killswitch status -o json",
        'killswitch trigger --reason "a b" --by ann   # now',
        "killswitch recover --reason x --by bob < code.txt",
        "kubectl killswitch -A status",
    ]
    for line in found:
        parse(line)
    for line in ("killswitch stop", "killswitch trigger --why x", "kubectl killswitch --everywhere status"):
        with pytest.raises(click.ClickException):
            parse(line)


def test_every_page_of_the_documents_is_in_their_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in sorted(ROOT.glob("docs/*.md")) if f"]({page.name})" not in index]
    assert missing == ["README.md"]


def test_pages_call_the_listener_by_names_that_it_answers_to() -> None:
    """A pod's name is answered with 421."""
    found = [str(page.relative_to(ROOT)) for page in PAGES if "http://POD:" in page.read_text(encoding="utf-8")]
    assert found == []
