"""One step on the ranks held against the same step in the oracle."""

import numpy as np
import oracle
import pytest
import torch
from small import gather_logical, open_small_job

from hpcmoe.model.balance import write_biases
from hpcmoe.model.text import draw_starts, share_of


def whole_batches(job, step):
    """The micro-batches of a step, of all ranks together, and which tokens of each are whose."""
    config, mesh = job.config, job.mesh
    length, num_parts = config.model.sequence_length, config.pipeline.micro_batches
    starts = draw_starts(len(job.training), config.data.batch_sequences, length, config.run.seed, step)
    batches, groups = [], []
    for part in range(num_parts):
        mine = starts[share_of(len(starts), part, num_parts)]
        batches.append(torch.from_numpy(job.training.sequences(mine, length).astype(np.int64)))
        shares = [share_of(len(mine), index, mesh.num_token_shares) for index in range(mesh.num_token_shares)]
        groups.append([slice(share.start * length, share.stop * length) for share in shares])
    return starts, batches, groups


def check_against_oracle(comm, folder, bias=0.0, **changes):
    """One step on the ranks and one in the oracle: the same loss, drops, gradients and norm; biases up to `bias`."""
    with open_small_job(comm, folder, **changes) as (job, optimizer, state):
        config = job.config
        load = np.random.default_rng(3).uniform(0, 2, (config.model.num_layers, config.model.num_experts))
        biases = np.random.default_rng(4).uniform(-bias, bias, load.shape).astype(np.float32)
        write_biases(job.stepper.network.layers, biases)
        weights = gather_logical(comm, state, lambda p: p.data)
        starts, batches, groups = whole_batches(job, 1)

        optimizer.zero_gradients()
        outcome = job.stepper.run(job.training, starts, load, "train")
        optimizer.sums.finish()
        gradients = gather_logical(comm, state, lambda p: p.grad)
        norm = optimizer.sums.global_norm()

    if comm.rank > 0:
        return outcome  # one oracle is enough: the ranks' gradients are all gathered

    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    total, entropy, dropped = oracle.loss_of(
        weights, config, batches, torch.tensor(load).float(), groups, torch.from_numpy(biases)
    )
    total.backward()
    assert outcome.loss == pytest.approx(entropy.item(), rel=2e-6)
    assert outcome.stats.num_dropped == dropped
    losses = (
        config.dispatch.aux_loss_weight * outcome.stats.aux_loss + config.dispatch.z_loss_weight * outcome.stats.z_loss
    )
    assert entropy.item() + losses == pytest.approx(total.item(), rel=2e-6)
    assert set(weights) == set(gradients)
    for name, weight in weights.items():
        largest = weight.grad.abs().max()
        assert torch.allclose(gradients[name], weight.grad, rtol=1e-4, atol=1e-5 * largest + 1e-9), name
    assert norm == pytest.approx(sum(w.grad.double().square().sum().item() for w in weights.values()) ** 0.5, rel=1e-5)
    return outcome
