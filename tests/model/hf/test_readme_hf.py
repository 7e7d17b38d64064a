"""The page of Hugging Face models is true where a machine can tell: its code runs, its names are the code's."""

import inspect
import re

import pytest
import torch
import torch.distributed
from launch import ROOT
from spreading import draw_ids, make_whole, skip_unless_pair

import hpcmoe
from hpcmoe.model.hf.adapters import ADAPTED
from hpcmoe.wait import barrier

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

README = (ROOT / "hpcmoe/model/hf/README.md").read_text()
FIRST, TRAINER = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def saved(comm, shared):
    """A checkpoint of a tiny model, and the model."""
    whole = make_whole("mixtral")
    if comm.rank == 0:
        whole.save_pretrained(shared / "whole")
    barrier(comm)
    return shared / "whole", whole


def take_step(whole, ids):
    """Take the first block's step on one process with the whole batch."""
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-4)
    num_items = ids[:, 1:].numel()
    output = whole(input_ids=ids, labels=ids, num_items_in_batch=num_items, output_router_logits=True)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
    optimizer.step()
    return output


@pytest.mark.mpi
def test_its_first_example_is_the_step_of_one_process(comm, saved, shared):
    from transformers import AutoModelForCausalLM

    all_ids, ids = draw_ids(comm)
    path, whole = saved
    names = {"torch": torch, "path": path, "ids": ids, "folder": shared / "trained"}
    exec(compile(FIRST, "README.md", "exec"), names)
    wanted = take_step(whole, all_ids)
    for name in ("loss", "aux_loss"):
        found = comm.allreduce(getattr(names["output"], name).item())
        assert found == pytest.approx(getattr(wanted, name).item(), rel=2e-6)
    trained = AutoModelForCausalLM.from_pretrained(shared / "trained").state_dict()
    for name, value in whole.state_dict().items():  # AdamW's first step is a sign: of rounding where a gradient is 0
        assert (trained[name] - value).abs().max() <= 2.1e-4 and (trained[name] - value).abs().mean() < 1e-6, name


@pytest.mark.mpi
def test_its_trainer_learns_as_on_one_process(comm, saved, shared):
    pytest.importorskip("transformers.distributed.expert_parallel", reason="needs transformers >= 5.24")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    skip_unless_pair(comm)
    ids = torch.arange(3, 15)
    arguments = {
        "output_dir": shared / "out", "max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1,
        "learning_rate": 1e-3, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    names = {
        "backend": "gloo", "meeting": f"file://{shared}/meeting", "path": saved[0], "arguments": arguments,
        "dataset": [{"input_ids": ids, "labels": ids}] * 16,
    }  # fmt: skip
    exec(compile(TRAINER, "README.md", "exec"), names)
    first, second = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    with torch.no_grad():
        wanted = saved[1](input_ids=ids[None], labels=ids[None]).loss.item()
    assert first == pytest.approx(wanted, rel=1e-5) and second < first


def test_its_functions_are_shown_with_their_arguments():
    shown = dict(re.findall(r"^\| `(\w+)\(([^)]*)\)`", README, re.MULTILINE))
    assert set(shown) == {"load", "spread", "save", "register"}
    for name, arguments in shown.items():
        assert [word for word in arguments.split(", ") if word != "*"] == list(
            inspect.signature(getattr(hpcmoe.hf, name)).parameters
        )


def test_it_names_all_families_that_are_tested_and_every_module():
    families = README[README.index("## Families") :]
    assert all(re.search(rf"\b{family}\b", families) for family in (*hpcmoe.hf.TESTED, *ADAPTED))
    modules = {path.name for path in (ROOT / "hpcmoe/model/hf").glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", README[README.index("## Modules") :])) == modules
