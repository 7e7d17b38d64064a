"""The program for a Hugging Face mixture of experts: loaded over the run's ranks, trained or run, and written back."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI

from hpcmoe import hf
from hpcmoe.checkpointing import TensorPiece, read_tensors
from hpcmoe.cluster.topology import Topology
from hpcmoe.config import Config
from hpcmoe.description import describe_run, describe_tokens
from hpcmoe.ending import end_in_order
from hpcmoe.errors import on_all, on_root
from hpcmoe.group import Group
from hpcmoe.group import open as open_group
from hpcmoe.messages import format_size
from hpcmoe.model.hf.spread import check_version
from hpcmoe.model.hf.stored_model import read_stored_model
from hpcmoe.model.hf.tiny import make_tiny
from hpcmoe.model.text import check_text
from hpcmoe.model.tokens import TokenText, find_tokens
from hpcmoe.output import print_to_stdout
from hpcmoe.prepare.process import estimate_process
from hpcmoe.pulse import busy
from hpcmoe.report.tables import make_table, record_results
from hpcmoe.report.totals import Totals, gather_totals
from hpcmoe.resuming import end_run
from hpcmoe.run.finite import check_arrays, label_array
from hpcmoe.run.metadata import describe_checkpoint, log_changes
from hpcmoe.run.train import is_due
from hpcmoe.run.trained_parts import checkpoint_activations, save_adapters, set_trained
from hpcmoe.run.tune import check_aux_loss, infer_tokens, tune
from hpcmoe.run.tuned_state import TunedState
from hpcmoe.run.tuning_job import TuningJob, check_sequences, make_tuning_job
from hpcmoe.write.checkpoint import read_metadata
from hpcmoe.write.mirror import choose_writer, open_mirror
from hpcmoe.write.records import Records, open_records
from hpcmoe.write.steps import newest_checkpoint, step_of
from hpcmoe.write.writer import Writer, open_writer

log = logging.getLogger(__name__)
_WHERE = '[model] source = "hf"'
_FOLDER = "hf"  # in a run's, of the model as its family's checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRun:
    """A run as it is asked for."""

    config: Config
    text: str  # of the config
    folder: Path  # of the run
    topology: Topology
    checkpoint: Path | None  # to begin with
    resumes: bool  # is the checkpoint one of the run's own?


def run_finetune(comm: MPI.Intracomm, run: TuningRun) -> int:
    """Load a model, train it or run it, record and write -> exit status. Collective over comm.

    The run's folder is open.
    """
    config, folder = run.config, run.folder
    on_all(comm, lambda: check_version(_WHERE))
    size = on_root(comm, lambda: read_vocabulary_size(config.model.path))
    split = on_root(
        comm, lambda: find_tokens(config.data, config.model.path, config.model.sequence_length, folder, size)
    )
    split = on_all(comm, lambda: check_text(split))
    with open_run_group(comm, config, run.topology) as group:
        process_bytes = estimate_process(comm, run.topology.node_of_rank, config.run.mode == "train")
        model = load_for_run(config, group)
        texts = TokenText(split.training), TokenText(split.validation)
        job = make_tuning_job(config, group, model, *texts, process_bytes)
        log_job(job)
        first_step = 0 if run.checkpoint is None else read_state(job, run.checkpoint)
        with open_records(comm, folder, first_step if run.resumes else None) as records:
            describe_run(records, job, run.text)
            with end_in_order(config.restart, folder if comm.rank == 0 else None) as job.stepper.ending:
                totals = work(job, records, folder, first_step)
                describe_tokens(records, job)
                record_results(records, job, totals)
        written: list[Path | None] = [folder / "run.h5"]
        if config.run.mode == "train":
            written += [newest_checkpoint(folder)]
            if not job.stepper.ending.is_agreed:  # else it goes on, and has no time left
                save_family(job, group, folder)
                written += [folder / _FOLDER]
        if comm.rank == 0:
            print_to_stdout(
                f"\n{make_table(job, totals)}\n\nwritten: {', '.join(str(path) for path in written if path)}"
            )
        return end_run(comm, job.stepper.ending, totals.num_steps)


def check_source(config: Config, num_ranks: int) -> None:
    """Check the folder of the model, and the sizes of batches. Raises ConfigError or CheckpointError.

    Where there is no such folder and [model] make_tiny names a family, a small random model of it is made there.
    """
    check_version(_WHERE)
    check_sequences(config, num_ranks)
    path, family = Path(config.model.path), config.model.make_tiny
    if family and not path.exists():
        num_parameters = make_tiny(family, path)
        log.info("%s: made, a random %s of %.1f million parameters", path, family, num_parameters / 1e6)
    read_stored_model(path)


def read_vocabulary_size(path: str) -> int:
    """Read how many tokens a checkpoint's model knows."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(path, local_files_only=True).get_text_config().vocab_size)


@contextlib.contextmanager
def open_run_group(comm: MPI.Intracomm, config: Config, topology: Topology) -> Iterator[Group]:
    """Open a group of the run's ranks as its config says. Collective over comm, both ends."""
    parallel, pipeline, data = config.parallel, config.pipeline, config.data
    sequences = -(-data.batch_sequences // pipeline.micro_batches)
    with open_group(
        comm,
        tensor_parallel=parallel.tensor or 1,
        data_parallel=parallel.data,
        expert_parallel=parallel.expert,
        device=config.comm.device,
        links=topology,
        schedule=pipeline.schedule,
        deterministic=pipeline.deterministic,
        in_flight=pipeline.num_in_flight,
        max_tokens=-(-sequences // comm.size) * config.model.sequence_length,
        threads=config.run.threads_per_rank,
    ) as group:
        yield group


def load_for_run(config: Config, group: Group) -> Any:
    """Load the model, and choose what of it is trained. Collective over the group."""
    settings, world = config.model, group.mesh.world
    model = hf.load(settings.path, group, dtype=getattr(torch, settings.dtype))
    on_all(world, lambda: check_aux_loss(model, config))
    on_all(world, lambda: set_trained(model, settings, config.run.seed))
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def log_job(job: TuningJob) -> None:
    """Log what is about to run, and in how much memory."""
    model, memory = job.spec.model, job.memory
    log.info(
        "%s: %d layers x %d experts, top-%d, hidden %d, feed-forward %d; %.2f M tokens to train on",
        job.model.config.model_type, model.num_layers, model.num_experts, model.top_k, model.hidden,
        model.feed_forward, len(job.training) / 1e6,
    )  # fmt: skip
    trained = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    held = sum(parameter.numel() for parameter in job.model.parameters())
    log.info(
        '[model] trains = "%s": %.3f of the %.3f M numbers of rank 0; memory of a rank %s, without activations',
        job.config.model.trains, trained / 1e6, held / 1e6, format_size(memory.total),
    )  # fmt: skip


def work(job: TuningJob, records: Records, folder: Path, first_step: int) -> Totals:
    """Train or infer, as [run] mode says -> the run's Totals. Collective over the group."""
    config, world = job.config, job.mesh.world
    owned = TunedState(job.mesh, job.model, job.optimizer).list_owned()
    state_bytes = sum(tensor.nbytes for _, tensor in owned)
    with (
        open_writer(world, folder, config.write.checkpoints_kept, config.write.asynchronous) as writer,
        open_mirror(world, folder, config.restart.mirror_every, state_bytes) as mirror,
    ):

        def save(step: int) -> None:
            """Write what is due after a step."""
            is_last = job.stepper.ending.is_agreed or is_due(step, config.write.checkpoint_every, config.run.steps)
            due = choose_writer(step, config.restart.mirror_every, is_last, writer, mirror)
            if is_due(step, config.write.hf_every, 0) and step < config.run.steps:
                with busy("writing the model"):
                    save_family(job, job.group, folder)
            if due is not None:
                with busy("writing a checkpoint"):
                    describe_tokens(records, job)
                    records.flush()
                    save_state(job, due, step)

        losses = tune(job, records, first_step, save) if job.optimizer else infer_tokens(job, records)
    return gather_totals(job, job.optimizer, losses, writer.snapshot_bytes)


def save_state(job: TuningJob, writer: Writer, step: int) -> None:
    """Write a checkpoint. Collective over the group. Raises TrainingError where a number is not finite."""
    world, config = job.mesh.world, job.config
    owned = TunedState(job.mesh, job.model, job.optimizer).list_owned()
    floating = [(label_array(part), tensor) for part, tensor in owned if tensor.is_floating_point()]
    on_all(world, lambda: check_arrays(floating, step, config))
    held = [TensorPiece(part=part, tensor=tensor) for part, tensor in owned]
    metadata = describe_checkpoint(config, step, world.size, len(job.training))
    writer.save(step, held, metadata)


def read_state(job: TuningJob, checkpoint: Path) -> int:
    """Read the state from a checkpoint of any number of ranks -> its step. Collective over the group."""
    world, step = job.mesh.world, step_of(checkpoint)
    metadata = on_root(world, lambda: read_metadata(checkpoint))
    read_tensors(job.mesh, checkpoint, TunedState(job.mesh, job.model, job.optimizer).list_held())
    for layer in job.layers:
        layer.refresh()
    if job.optimizer is not None:
        job.optimizer.set_step(step)
    log.info("resumed %s, step %d, written by %d ranks", checkpoint, step, metadata["num_ranks"])
    log_changes(metadata, job.config, len(job.training))
    return step


def save_family(job: TuningJob, group: Any, folder: Path) -> None:
    """Write the model as its family's checkpoint, adapters as PEFT's. Collective over the group."""
    if job.config.model.trains == "lora":
        on_root(job.mesh.world, lambda: save_adapters(job.model, folder / _FOLDER))
    else:
        hf.save(job.model, group, folder / _FOLDER)
