"""README.md is short, and true where a machine can tell: chapters, links, files, commands, figures, its model."""

import pathlib
import re
import shlex
import subprocess
import sys

import plain_torch
import pytest
from launch import MPIRUN, run

import hpcmoe
from hpcmoe import __version__
from hpcmoe.config import read_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CHAPTERS = sorted(folder.parent.name for folder in (ROOT / "hpcmoe").glob("*/__init__.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "hpcmoe").glob("*/README.md")), ROOT / "tests/README.md"]


def test_it_is_read_in_an_evening():
    assert len(README.splitlines()) <= 150


def test_its_tree_has_a_line_for_each_chapter_in_the_order_of_imports():
    tree = README[README.index("## The tree") : README.index("## Where to read on")]
    assert re.findall(r"^  (\w+)/ ", tree, re.MULTILINE) == CHAPTERS


def test_it_names_the_version():
    assert f"Version {__version__} (" in README


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_that_a_document_names_exist(document):
    text = re.sub(r"```python\n.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for path in set(re.findall(r"(?<![\w/.])((?:inputs|jobs|tests)/[\w./]+\.\w+)", text)):
        assert (ROOT / path).is_file(), path


def test_its_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert pictures and all((ROOT / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_its_chapters_all_have_a_document_that_it_links():
    linked = set(re.findall(r"\(hpcmoe/(\w+)/README\.md\)", README))
    assert linked == {path.parent.name for path in DOCUMENTS[1:-1]}


def test_commands_it_names_exist():
    targets = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    known = subprocess.run(["make", "-s", "-C", ROOT], capture_output=True, text=True, check=True).stdout
    assert targets and all(f"make {target}" in known for target in targets)


def test_the_modules_that_a_token_passes_are_there():
    path = README[README.index("## The path of a token") : README.index("## The tree")]
    modules = re.findall(r"`(\w+/\w+\.py)`", path)
    assert len(modules) >= 8 and all((ROOT / "hpcmoe" / module).is_file() for module in modules)


def test_settings_on_its_command_lines_are_taken():
    commands = [line for line in README.splitlines() if "--set" in line and not line.startswith(("$", "hpcmoe:"))]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        read_config(ROOT / "inputs/run.toml", [words[at + 1] for at, word in enumerate(words) if word == "--set"])


def test_its_model_is_that_of_plain_torch_in_one_process_and_on_two_ranks(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    block = block.replace("out/model", str(tmp_path / "model"))
    script = tmp_path / "this.py"
    script.write_text(f"{block}    print(*model[1].weight.flatten().tolist() if group.rank == 0 else ())\n")
    found = []
    for ranks in (1, 2):
        command = [sys.executable, script] if ranks == 1 else [MPIRUN, "-n", ranks, sys.executable, script]
        ended = run(*command, PYTHONPATH=str(ROOT), OMP_THREAD_LIMIT="1")
        assert ended.status == 0 and ended.errors == "" and (tmp_path / "model").is_dir(), ended
        found.append([float(word) for word in ended.output.split()])

    names: dict = {}
    monkeypatch.setattr(hpcmoe, "open", plain_torch.open_group)
    monkeypatch.setattr(hpcmoe, "MoE", plain_torch.MoE)
    exec(compile(block, "README.md", "exec"), names)
    wanted = names["model"][1].weight.flatten().tolist()
    assert found == [pytest.approx(wanted, rel=1e-5, abs=1e-5)] * 2
