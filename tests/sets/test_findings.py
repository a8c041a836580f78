import re
from pathlib import Path

from ddkit.sets.findings import Finding

ROOT = Path(__file__).resolve().parents[2]


def test_every_code_and_no_other_is_explained_in_the_readme():
    sources = "".join(
        path.read_text(encoding="utf-8") for package in ("checks", "sets") for path in (ROOT / "ddkit" / package).glob("*.py")
    )
    used = set(re.findall(r'"([FTLNC]\d{3})"', sources))
    readme = (ROOT / "submission" / "README.md").read_text(encoding="utf-8")
    explained = {code for row in re.findall(r"^\| ([FTLNC]\d{3}.*?) \|", readme, re.M) for code in row.split(", ")}
    assert len(used) > 40 and used == explained


def test_names_keep_their_letters_and_lose_their_control_characters():
    finding = Finding("error", "F009", "\x1b[31mété\x07\udcff", "a\nb")
    assert finding.message == "\\x1b[31mété\\x07\\udcff" and finding.where == "a\\nb"
