"""The README is true where a machine can tell: keys, files, commands, figures."""

import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_shows_run_toml_as_it_is():
    assert f"```toml\n{(ROOT / 'inputs/run.toml').read_text()}```" in README


def test_names_every_chapter_of_the_package():
    chapters = {folder.parent.name for folder in (ROOT / "hpcmoe").glob("*/__init__.py")}
    assert {name for name in chapters if f"{name}/" not in README} == set()


def test_commands_it_names_exist():
    targets = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    known = subprocess.run(["make", "-s", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    assert targets and all(f"make {target}" in known for target in targets)
    for path in set(re.findall(r"\b((?:inputs|jobs|tests)/[\w.]+\.\w+)", README)):
        assert (ROOT / path).is_file(), path


def test_figures_it_explains_are_those_of_the_table():
    shown = README[README.index("## What it prints") : README.index("It leaves")]
    meaning = README[README.index("## What the figures mean") : README.index("## How it is built")]
    rows = re.findall(r"^\| ([^|]+?) \|", meaning, re.MULTILINE)[2:]
    for row in rows:
        assert row.split(" ...")[0].split(",")[0].removeprefix("in ") in shown, row
