"""What a package has: a licence, one version, a command that lists the others, and the manual inside."""

import configparser
import re
import subprocess
import sys
import tomllib

import pytest
from launch import ROOT, run

import hpcmoe
from hpcmoe import __main__ as command
from hpcmoe.arguments import name_program
from hpcmoe.config import Config, read_config
from hpcmoe.settings import MANUAL, main, write_config

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
HEAVY = {"mpi4py.MPI", "torch", "numba", "numpy", "pydantic"}  # what takes long to import


def test_the_licence_and_its_owner_are_named():
    metadata = SETUP["metadata"]
    assert metadata["license"] == "BSD-3-Clause" and metadata["license_files"] == "LICENSE"
    assert metadata["author"] == "hpcmoe developers" and metadata["keywords"] and metadata["classifiers"]
    assert "http" not in str(dict(metadata))
    assert "Copyright (c) 2026, hpcmoe developers" in (ROOT / "LICENSE").read_text()


def test_the_version_is_in_one_place_and_what_it_changed_is_told():
    assert SETUP["metadata"]["version"] == "attr: hpcmoe.__version__"
    changes = (ROOT / "hpcmoe" / "run" / "README.md").read_text().split("## What changed")[1]
    assert re.search(r"\*\*([\d.]+)\.\*\*", changes).group(1) == hpcmoe.__version__


def test_what_is_no_python_travels_in_the_package():
    data = SETUP["options.package_data"]
    assert {name for names in data.values() for name in names.split(", ")} >= {"py.typed", "run.toml", "*.cu"}
    assert (ROOT / "hpcmoe" / "py.typed").is_file()
    assert MANUAL.read_bytes() == (ROOT / "inputs" / "run.toml").read_bytes()


def test_the_list_and_the_manual_import_nothing_that_takes_long():
    calls = "".join(f"main({words}); " for words in ([], ["--version"], ["config"]))
    ask = f"import sys; from hpcmoe.__main__ import main; {calls}print(*sorted(set(sys.modules) & {HEAVY}))"
    ended = run(sys.executable, "-c", ask, PYTHONPATH=str(ROOT))
    assert ended.status == 0 and ended.output.splitlines()[-1] == "", ended


def test_place_and_config_need_no_mpi(tmp_path):
    """A package of its name that cannot be imported stands for an mpi4py without a library."""
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text(
        "raise ImportError('libmpi.so.12: cannot open shared object file')"
    )
    path = f"{tmp_path}:{ROOT}"
    for words in (["config", "--set", "model.top_k=1"], ["place", "--help"]):
        ended = run(sys.executable, "-m", "hpcmoe", *words, PYTHONPATH=path)
        assert ended.status == 0 and ended.errors == "", ended
    for words in (["-m", "hpcmoe", "run"], ["-m", "hpcmoe.main"], ["-m", "hpcmoe.check"]):
        ended = run(sys.executable, *words, PYTHONPATH=path, PMI_RANK="0")
        assert ended.status == 2 and ended.output == "", ended
        assert len(ended.errors.splitlines()) == 1 and "libmpi.so.12" in ended.errors, ended


def test_a_package_that_is_missing_is_one_line_and_status_2(monkeypatch, capsys):
    """As where the environment is not active."""
    monkeypatch.setitem(command.COMMANDS, "config", ("no_such_package", False, "", ""))
    monkeypatch.setattr(command, "prepare_process", lambda: None)
    assert command.main(["config"]) == 2
    assert re.fullmatch(r"hpcmoe: no_such_package is not installed in .* activate .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("word", ["-h", "--help", None])
def test_all_commands_are_listed(word, capsys):
    assert command.main([] if word is None else [word]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in ("run", "place", "check", "config"))


def test_the_version_is_shown(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hpcmoe {hpcmoe.__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [("rum", "did you mean run?"), ("--x", "allowed: run, place, plan, check, report, hf, generate, config")],
)
def test_an_unknown_command_is_one_line_and_status_2(word, hint, capsys):
    assert command.main([word]) == 2
    assert capsys.readouterr().err == f"hpcmoe: command line: '{word}': unknown command; {hint}\n"


def test_every_command_is_a_module_with_a_main():
    for module, *_ in command.COMMANDS.values():
        assert "\ndef main(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def test_a_command_goes_by_the_name_it_was_called_by(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hpcmoe run", "inputs/run.toml"])
    assert name_program("hpcmoe.main") == "hpcmoe run"
    monkeypatch.setattr(sys, "argv", ["hpcmoe/main.py", "inputs/run.toml"])
    assert name_program("hpcmoe.main") == "python -m hpcmoe.main"


def test_the_manual_is_shown_as_it_is(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out == MANUAL.read_text()


def test_a_config_reads_back_as_it_was_written(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(
        '[run]\nname = "a \\"b\\" c:\\\\d \\u00fc \\U0001f600 \'"\nseed = 9223372036854775807\n'
        "[cluster]\nmeasure_seconds = 1e16\nracks = ['a', 'b']\n[placement]\nloads = './a.json'\n"
        "[model]\nattention = false\n[train]\nepsilon = 1e-8\nlearning_rate = 1\n"
        "[write]\nactivations_of_layers = [1, 0]\n"
    )
    config, _ = read_config(file)
    (tmp_path / "again.toml").write_text(write_config(config))
    assert read_config(tmp_path / "again.toml")[0] == config != Config()


def test_a_whole_config_is_shown_with_its_overrides(tmp_path, capsys):
    file = tmp_path / "my.toml"
    file.write_text("[model]\nnum_experts = 8\n")
    assert main([str(file), "--set", "model.top_k=1"]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    whole = tomllib.loads(MANUAL.read_text())
    assert shown == whole | {"model": whole["model"] | {"num_experts": 8, "top_k": 1}}


def test_every_error_of_a_config_is_a_line_and_the_status_is_2(tmp_path, capsys):
    file = tmp_path / "my.toml"
    file.write_text("[model]\nhiden = 8\n[moddel]\n")
    assert main([str(file), "--set", "model.top_k=0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 3
    assert main([str(file), "--sett"]) == 2
    assert main([str(tmp_path / "none.toml")]) == 2
    assert all(line.startswith("hpcmoe: ") for line in capsys.readouterr().err.splitlines())


def test_a_reader_that_leaves_early_is_no_error():
    for words in ("hpcmoe config", "hpcmoe.place --help"):
        ended = run("bash", "-o", "pipefail", "-c", f"{sys.executable} -m {words} | true")
        assert ended.status == 0 and ended.errors == "", ended


def test_make_says_what_it_installs_for_a_run_and_what_for_the_tests(tmp_path):
    """Asked for an environment that is not there, make shows what it would do."""
    shown = {
        target: subprocess.run(
            ["make", "-n", "-C", ROOT, target, f"VENV={tmp_path}"], capture_output=True, text=True, check=True
        ).stdout
        for target in ("run", "test-serial")
    }
    assert "what running needs" in shown["run"] and "GB on disk" in shown["run"]
    assert "[test]" not in shown["run"] and "compile_search" not in shown["run"]
    assert "what tests need" in shown["test-serial"] and "compiling the placement's search" in shown["test-serial"]
