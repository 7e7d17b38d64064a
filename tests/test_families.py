"""`hpcmoe hf` as its user meets it: a small model made and checked, and what is refused."""

import sys

import pytest
from launch import mpirun, run

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

HF = ("-m", "hpcmoe", "hf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Make a small model by the command itself -> its folder."""
    folder = tmp_path_factory.mktemp("made") / "mixtral"
    ended = run(sys.executable, *HF, "--make-tiny", "mixtral", folder)
    assert ended.status == 0 and "a random mixtral of 54.5 million parameters" in ended.output, ended
    return folder


def test_a_check_compares_every_tensor_and_shows_what_binds(model):
    ended = mpirun(2, *HF, model, "--check")
    assert ended.status == 0, ended
    rows = [line.split() for line in ended.output.splitlines()]
    ratios = {
        tuple(row[:-4]): float(row[-4]) for row in rows if len(row) >= 5 and row[-1].isdigit() and "e-" in row[-4]
    }
    assert ("logits",) in ratios and ("gradient", "of", "model.layers.*.mlp.experts.down_proj") in ratios, ended
    assert len(ratios) == 14 and all(0 <= ratio < 1e-5 for ratio in ratios.values()) and any(ratios.values()), ended
    for said in ("8 experts  of 4 layers, 4 slots a rank", "what binds", "rank 0 on", "experts' weights"):
        assert said in ended.output, ended


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "command line: give a MODEL and --check, or --make-tiny FAMILY FOLDER"),
        (["--make-tiny", "mixtrel", "new"], "hpcmoe hf: 'mixtrel': unknown family; did you mean mixtral?"),
        (["nowhere", "--check"], "nowhere"),
        (["nowhere"], "command line: what to do with nowhere? --check"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(words, said):
    ended = run(sys.executable, *HF, *words)
    assert ended.status == 2 and len(ended.lines("hpcmoe:")) == 1 and said in ended.errors, ended
