"""The program trains a Hugging Face model, resumes it, writes its family's checkpoint, and says what is wrong."""

import contextlib
import json

import h5py
import pytest
import torch
from launch import mpirun, mpirun_several
from mpi4py import MPI

from hpcmoe.errors import HpcmoeError
from hpcmoe.main import read_run_arguments, run

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

KEYS = {
    "model.source": "hf", "model.sequence_length": "32", "run.steps": "6", "data.batch_sequences": "6",
    "data.validation_sequences": "6", "data.files": '["{stdlib}/json/*.py"]', "train.learning_rate": "0.003",
    "train.learning_rate_warmup_steps": "2", "train.validate_every": "3", "write.checkpoint_every": "3",
    "placement.search_iterations": "50", "train.shard_optimizer": "true",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Make a tiny model with its tokenizer -> its folder."""
    from hpcmoe.model.hf.tiny import Widths, make_tiny

    folder = tmp_path_factory.mktemp("tiny") / "mixtral"
    widths = {"hidden": 16, "feed_forward": 16, "dense_feed_forward": 16, "num_layers": 2, "num_heads": 2}
    make_tiny("mixtral", folder, Widths(**widths, num_key_heads=2))
    return folder


def finetune(model, output, *options, **keys):
    """Spell the program's arguments for a short run of a model that writes under output."""
    chosen = KEYS | {"model.path": str(model), "run.output": str(output)}
    chosen |= {key.replace("__", "."): str(value) for key, value in keys.items()}
    return [
        "-m", "hpcmoe.main", "inputs/run.toml",
        *(word for key, value in chosen.items() for word in ("--set", f"{key}={value}")), *options,
    ]  # fmt: skip


def read_losses(folder):
    """Read the losses of a run's steps -> {step: loss}."""
    with h5py.File(folder / "run.h5") as file:
        loss = file["train/loss"]
        return dict(zip(loss["step"][:].tolist(), loss["value"][:].tolist(), strict=True))


def test_a_run_is_recorded_resumed_and_written_for_transformers(tiny, tmp_path):
    whole, again, adapters = (finetune(tiny, tmp_path, run__name=name) for name in ("whole", "again", "lora"))
    ended, (table, resumed, _, inference) = mpirun_several(
        2,
        whole,
        [*again, "--resume", tmp_path / "whole" / "checkpoint-3"],
        [*adapters, "--set", "model.trains=lora", "--set", "write.hf_every=4"],
        finetune(tmp_path / "whole" / "hf", tmp_path, run__name="infer", run__mode="infer", run__steps=2),
    )
    assert "validation loss, last" in table and "nats/token" in table and "experts, parameters" in table
    losses, others = read_losses(tmp_path / "whole"), read_losses(tmp_path / "again")
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    assert others == {step: losses[step] for step in (4, 5, 6)}
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert "perplexity" in inference and "resumed" in ended.errors
    check_family(tiny, tmp_path, resumed)


def check_family(tiny, folder, resumed):
    """Check that transformers reads what a run has written, and PEFT its adapters."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(8)[None]
    trained, first, again = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder / "whole/hf", tiny, folder / "again/hf")
    )
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), again.parameters(), strict=True))
    assert not torch.equal(trained(ids).logits, first(ids).logits) and str(folder / "again/hf") in resumed
    adapted = PeftModel.from_pretrained(first, folder / "lora/hf")
    of_adapters = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert len(of_adapters) == 8 and all(p.abs().max() > 0 for p in of_adapters.values())
    assert (
        AutoTokenizer.from_pretrained(folder / "whole/hf").vocab_size == AutoTokenizer.from_pretrained(tiny).vocab_size
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model__path": "/nowhere"}, "/nowhere: no such folder"),
        ({"data__batch_sequences": 1, "pipeline__micro_batches": 2}, "micro_batches = 2: must be at most [data] batch"),
        ({"data__validation_sequences": 1}, "[data] validation_sequences = 1: must be at least [pipeline]"),
        ({"model__hidden": 32}, "[model] hidden = 32: must be left out"),
        (
            {"model__trains": "lora", "model__lora_targets": '["w1"]'},
            "'w1' is no dense matrix of this model: it has k_",
        ),
        ({"parallel__tensor": 2}, "tensor"),
    ],
)
def test_what_cannot_be_is_one_line(tiny, tmp_path, keys, said):
    with pytest.raises(HpcmoeError) as error, contextlib.ExitStack() as opened:
        words = [str(word) for word in finetune(tiny, tmp_path, **keys)[2:]]
        run(MPI.COMM_SELF, read_run_arguments(words), opened)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_the_loss_that_is_asked_for_is_one_line_on_all_ranks(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    ended = mpirun(2, *finetune(tmp_path / "other", tmp_path / "out"))
    assert ended.status == 2 and ended.lines("hpcmoe: ") == [
        line for line in ended.errors.splitlines() if "other" in line
    ]
