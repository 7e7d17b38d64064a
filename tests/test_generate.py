"""`hpcmoe generate` continues prompts by a run's checkpoint or a Hugging Face one, and ends with one line where not."""

import contextlib
import json
import sys

import pytest
from launch import mpirun, run
from mpi4py import MPI
from small import make_config

from hpcmoe import main as program
from hpcmoe.errors import HpcmoeError
from hpcmoe.generate import generate, read_generate_arguments
from hpcmoe.settings import write_config
from hpcmoe.wait import barrier

ALPHABET = b"abcdefghijklmnop"
PROMPTS = "abcd\nmn\nghijklmnopabcdef\n\nc\nopabcdefghijklmnopabcdefghijklmnop\n"
STEPS = 25


def train(comm, folder, **changes):
    """Train our own model on a text that it soon knows by heart -> the run's folder. Collective."""
    if comm.rank == 0:
        (folder / "text.txt").write_bytes(ALPHABET * 400)
        config = make_config(
            data__files=(str(folder / "text.txt"),), data__exclude=(), run__steps=STEPS,
            run__output=str(folder / "out"),
            model__hidden=32, model__feed_forward=32, model__sequence_length=12, train__learning_rate_warmup_steps=2,
            dispatch__capacity_factor=1.0, dispatch__bias_update_speed=0.01, write__checkpoint_every=STEPS,
            train__validate_every=0, **changes,
        )  # fmt: skip
        (folder / "run.toml").write_text(write_config(config))
        (folder / "prompts.txt").write_text(PROMPTS)
    barrier(comm)
    with contextlib.ExitStack() as opened:
        program.run(comm, program.read_run_arguments([str(folder / "run.toml")]), opened)
    barrier(comm)
    return folder / "out" / "run"


def call(comm, *words):
    """Run the command's work on the ranks of comm. Collective."""
    generate(comm, read_generate_arguments([*map(str, words), "--threads", "1"]))
    barrier(comm)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.mpi
def test_a_run_is_continued_at_any_number_of_ranks_by_what_it_has_learned(comm, shared, capsys):
    folder = train(comm, shared)
    words = folder, "--prompts", shared / "prompts.txt", "--max-new-tokens", 30, "--batch", 2
    call(comm, *words, "--output", shared / "all.jsonl")
    entries = read_lines(shared / "all.jsonl")
    assert [entry["prompt"] for entry in entries] == PROMPTS.split()
    for entry in entries:
        first = ALPHABET.index(entry["prompt"][-1].encode()) + 1
        assert entry["text"].encode() == (3 * ALPHABET)[first : first + 30] == bytes(entry["tokens"])
        assert entry["finish_reason"] == "length"

    # Draw at other numbers of ranks, from the checkpoint itself where nothing else of the run is.
    moved = shared / f"checkpoint-{STEPS}"
    if comm.rank == 0:
        (folder / moved.name).rename(moved)
    drawn = "--prompts", shared / "prompts.txt", "--max-new-tokens", 15, "--temperature", 2.0, "--seed", 5, "--output"
    barrier(comm)
    call(comm, moved, *drawn, shared / "drawn.jsonl")
    alone = comm.Split(comm.rank)
    call(alone, moved, *drawn, shared / f"alone{comm.rank}.jsonl")
    alone.Free()
    assert read_lines(shared / f"alone{comm.rank}.jsonl") == read_lines(shared / "drawn.jsonl")
    capsys.readouterr()

    # Show one text as it comes.
    call(comm, moved, "--prompt", "abc", "--max-new-tokens", 5)
    shown = capsys.readouterr()
    assert shown.out == ("abcdefgh\n" if comm.rank == 0 else "")
    assert ("1 prompt of 3 tokens, 5 tokens added in" in shown.err) == (comm.rank == 0)


@pytest.mark.mpi
def test_a_hugging_face_checkpoint_is_continued_as_transformers_does(comm, shared, capsys):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")
    import torch

    from hpcmoe.model.hf.tiny import Widths, make_tiny

    folder, texts = shared / "model", ["def main():", "import", "class A:\n    x = 1"]
    if comm.rank == 0:
        widths = {"hidden": 32, "feed_forward": 32, "num_layers": 2, "num_heads": 4, "num_key_heads": 2}
        make_tiny("mixtral", folder, Widths(**widths, num_positions=24))
        (shared / "p.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    barrier(comm)
    call(comm, folder, "--prompts", shared / "p.jsonl", "--max-new-tokens", 9, "--output", shared / "o.jsonl")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, entry in zip(texts, read_lines(shared / "o.jsonl"), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        limit = min(9, 24 - ids.shape[1])
        wanted = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)[0]
        assert entry["tokens"] == wanted[ids.shape[1] :].tolist() and entry["prompt"] == text
        assert text + entry["text"] == tokenizer.decode(wanted, skip_special_tokens=True)

    # Show one text as it comes.
    capsys.readouterr()
    call(comm, folder, "--prompt", texts[0], "--max-new-tokens", 9)
    shown = capsys.readouterr().out
    assert shown == (f"{texts[0]}{read_lines(shared / 'o.jsonl')[0]['text']}\n" if comm.rank == 0 else "")
    with pytest.raises(HpcmoeError, match=r"^--prompt: \d+ tokens [+] 1 new one = \d+ positions, the model has 24$"):
        call(comm, folder, "--prompt", 40 * "xyz ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "command line: no MODEL; try"),
        (("M",), "command line: no prompt: --prompts FILE or --prompt TEXT"),
        (("M", "--prompt", "a", "--prompts", "b"), "argument --prompts: not allowed with argument --prompt"),
        (("M", "--prompt", "a", "--batch", "0"), "command line: --batch 0: must be at least 1"),
        (("M", "--prompt", "a", "--threads", "-1"), "command line: --threads -1: must be at least 0"),
        (("M", "--prompt", "a", "--top-k", "x"), "command line: argument --top-k: invalid int value"),
        (("/none", "--prompt", "a"), "MODEL = /none: is no folder with a Hugging Face checkpoint (config.json) or a"),
        (("$NONE_SUCH", "--prompt", "a"), "MODEL = '$NONE_SUCH': $NONE_SUCH is not set"),
        (("{folder}", "--prompt", "a"), "holds neither a Hugging Face checkpoint (config.json) nor a checkpoint of"),
        (("{run}", "--prompts", "{folder}/none"), "none: cannot be read: No such file"),
        (("{run}", "--prompt", "a", "--output", "{folder}"), "cannot be written: is a folder"),
        (("{run}", "--prompt", "a", "--output", "/proc/o"), "/proc/o: cannot be written: "),
        (("{run}", "--prompts", "{folder}/p", "--output", "{folder}/p"), "cannot be written: is what --prompts reads"),
        (("{run}", "--prompt", "a", "--max-new-tokens", "0"), "command line: max_new_tokens = 0: must be greater"),
        (("{run}", "--prompt", "", "--max-new-tokens", "1"), "--prompt: '': has no tokens to begin with"),
        (("{run}", "--prompt", "a"), "checkpoint-1/SHA256SUMS is missing"),
        (("{hf}", "--prompt", "a"), "hf: has no tokenizer: tokenizer.json"),
    ],
)  # fmt: skip
def test_what_the_user_can_mend_is_one_line(words, said, tmp_path):
    (tmp_path / "p").write_text("a")
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mixtral"}')
    places = {"folder": tmp_path, "run": tmp_path / "run", "hf": tmp_path / "hf"}
    with pytest.raises(HpcmoeError) as error:
        generate(MPI.COMM_SELF, read_generate_arguments([word.format(**places) for word in words]))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_without_transformers_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HpcmoeError, match=r"needs transformers >= 5.9: pip install 'hpcmoe\[hf\]'"):
        generate(MPI.COMM_SELF, read_generate_arguments([str(tmp_path), "--prompt", "a"]))


def test_help_is_shown_and_errors_end_all_ranks_with_status_2():
    ended = run(sys.executable, "-m", "hpcmoe", "generate", "--help")
    assert ended.status == 0 and "usage: hpcmoe generate" in ended.output and "--top-p" in ended.output, ended
    ended = mpirun(2, "-m", "hpcmoe.generate", "/none", "--prompt", "a")
    assert ended.status == 2 and ended.output == "", ended
    assert len(ended.lines("hpcmoe: MODEL = /none")) == 1 and "Traceback" not in ended.errors, ended
