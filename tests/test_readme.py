"""What the documents point to exists: files, headings, commands and their options."""

import re
import shlex
from pathlib import Path

import click

from ddkit.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    ".github/CONTRIBUTING.md",
    "ddkit/ARCHITECTURE.md",
    "submission/README.md",
    "tools/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools" / "results").glob("*.md")),
)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(name):
    """The anchors that GitHub gives to a document's headings."""
    prose = re.sub(r"^```.*?^```", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def code_of(name):
    """Every line of the code blocks, and every piece of code within a sentence or a table."""
    text = text_of(name)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        yield from (line.removeprefix("$ ") for line in block.replace("\\\n", " ").splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))


def options_in(line):
    return {word.partition("=")[0] for word in line.split() if re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word)}


def test_links_of_documents_lead_to_files_and_headings():
    found = [(name, "".join(link.split())) for name in DOCUMENTS for link in re.findall(r"\]\(([^)]+)\)", text_of(name))]
    ours = [(name, link) for name, link in found if not link.startswith("http")]
    assert len(ours) > 10
    for name, link in ours:
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target.resolve().relative_to(ROOT)), f"{name}: {link}"


def commands():
    for name in DOCUMENTS:
        for line in code_of(name):
            if line.startswith("ddkit "):
                yield name, line.partition(" # ")[0].partition(" -> ")[0]


def test_commands_in_documents_exist_with_their_options():
    found = list(commands())
    assert len(found) > 30
    for name, line in found:
        command, words = main, shlex.split(line)[1:]
        with click.Context(main) as context:
            while isinstance(command, click.Group) and words and not words[0].startswith("-"):
                command = command.get_command(context, words.pop(0))
                assert command is not None, f"{name}: {line}"
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert options_in(line) <= known | {"--help"}, f"{name}: {line}"


def test_tools_in_documents_exist_with_their_options():
    lines = ((name, line.partition(" #")[0]) for name in DOCUMENTS for line in code_of(name))
    found = [(name, line) for name, line in lines if re.match(r"(python )?tools/\w", line)]
    assert len(found) > 10
    for name, line in found:
        (tool,) = re.findall(r"tools/[\w.]+", line)
        assert (ROOT / tool).is_file(), f"{name}: {line}"
        known = set(re.findall(r'"(--[a-z-]+)"', text_of(tool)))
        assert options_in(line) <= known, f"{name}: {line}"
