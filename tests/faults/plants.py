"""The faults: each a small descriptor of the kind that is made, and the part of `make test` that must catch it."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One descriptor."""

    file: str  # of the package
    old: str  # stands there once
    new: str
    tests: tuple[str, ...]  # pytest's words
    ranks: int = 0  # of mpirun; 0: a serial test


def plant(file, old, new, tests, ranks=0):
    """Shorten the writing of a Fault: folders hpcmoe/ and tests/ are left out."""
    words = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]
    return Fault(file=f"hpcmoe/{file}", old=old, new=new, tests=tuple(words), ranks=ranks)


PLAN, EXCHANGE = "dispatch/test_plan.py", "dispatch/test_host.py"
ORACLE, LANES = "run/test_oracle.py -k whatever_two", "pipeline/test_lanes_threads.py"
ROUTER, FFN, STATE = "dispatch/test_router.py", "experts/test_feed_forward.py", "run/test_state.py"
FAULTS = {
    # PLACEMENT: what a layout costs, and how the memory is dealt.
    "a link is priced the wrong way round": plant(
        "placement/resources.py", "sent * problem.link_cost +", "sent.T * problem.link_cost +", "placement/test_cost.py"
    ),
    "what stays on a node loads its port": plant(
        "placement/resources.py",
        "np.where(np.eye(len(sent)), 0.0, sent)",
        "np.where(np.eye(len(sent)), sent, sent)",
        "placement/test_cost.py",
    ),
    "racks in and out change places": plant(
        "placement/resources.py",
        "between.sum(axis=1), between.sum(axis=0))",
        "between.sum(axis=0), between.sum(axis=1))",
        "placement/test_cost.py",
    ),
    "a farther tier takes tokens too": plant(
        "placement/cost.py",
        "distance[:, order] == np.repeat(np.minimum.reduceat(distance[:, order], first, axis=1), size, axis=1)",
        "distance[:, order] <= 2",
        "placement/test_cost.py",
    ),
    "a bound is met from too far": plant(
        "placement/cost.py",
        "bound >= cost * (1 - _BOUND_TOLERANCE)",
        "bound >= cost * (1 - 0.1)",
        "placement/test_result.py",
    ),
    "the memory's remainders all go to the first layers": plant(
        "placement/quotas.py", "        first += number\n", "", "placement/test_quotas.py"
    ),
    "ranks that must be even may be one short": plant(
        "placement/quotas.py",
        "np.minimum(most_of_rank(problem) - 1, holds)",
        "np.minimum(most_of_rank(problem) - 2, holds)",
        "placement/test_quotas.py",
    ),
    "a rank's share is not of its own node": plant(
        "placement/result.py",
        "distance = self.distance[node, self",
        "distance = self.distance[0, self",
        "placement/test_result.py",
    ),
    "copies that stay are sent again": plant(
        "placement/migrate.py", "~np.isin(new[slots], old[slots]) & (new", "(new", "placement/test_migrate.py"
    ),
    "an expert comes from the farthest holder": plant(
        "placement/migrate.py",
        "np.lexsort((sends[holders // size], distance))[0]",
        "np.lexsort((sends[holders // size], distance))[-1]",
        "placement/test_migrate.py",
    ),
    "noise speaks for a move": plant(
        "placement/migrate.py",
        "cost_seconds + horizon * noise",
        "cost_seconds - horizon * noise",
        "placement/test_migrate.py",
    ),
    "a node's lightest expert is seated first": plant(
        "placement/search/balance_node.py",
        "np.lexsort((experts, -weight[experts]",
        "np.lexsort((experts, weight[experts]",
        "placement/search/test_balance_node.py",
    ),
    # PLAN: which copy takes which way.
    "messages cut one token too many": plant(
        "dispatch/plan.py",
        "part = slice(begin, begin + max_tokens)",
        "part = slice(begin, begin + max_tokens + 1)",
        PLAN,
    ),
    "a message's second part counts tokens from the first": plant(
        "dispatch/plan.py",
        "(token_of_assignment[inside] - begin).astype",
        "(token_of_assignment[inside] - 0).astype",
        PLAN,
    ),
    "all ranks send their single copies to one replica": plant(
        "dispatch/plan.py", "self.phase = rank * _GOLDEN_RATIO % 1.0", "self.phase = 0 * _GOLDEN_RATIO % 1.0", PLAN
    ),
    "a shard's slot is that of its neighbour's replica": plant(
        "dispatch/plan.py", "position[:, None] * num_shards + np.arange", "position[:, None] + np.arange", PLAN
    ),
    # ROUTER
    "gates see the bias": plant(
        "dispatch/router.py", "Softmax.apply(logits, weighing,", "Softmax.apply(logits + self.bias, weighing,", ROUTER
    ),
    "load attracts": plant("dispatch/router.py", "(self.bias - pressure)", "(self.bias + pressure)", ROUTER),
    "an expert takes one copy less than its capacity": plant(
        "dispatch/router.py", "(place <= capacity)", "(place < capacity)", ROUTER
    ),
    "second choices are dropped after first tokens": plant(
        "dispatch/router.py",
        "one_hot(experts.T.flatten(), num_experts)",
        "one_hot(experts.flatten(), num_experts)",
        ROUTER,
    ),
    "the z-loss pushes half as hard": plant(
        "dispatch/router.py", "(2 * grad_z) * log_sums", "grad_z * log_sums", ROUTER
    ),
    # EXPERTS
    "the gate's gradient forgets the output's bias": plant(
        "gemm.py", "total += grad_y.float() @ self.bias.float()", "pass", FFN
    ),
    "the down matrix learns from gradients without gates": plant(
        "experts/feed_forward.py",
        'matrices["down"].add_gradients(grad_y * gates, hidden)',
        'matrices["down"].add_gradients(grad_y, hidden)',
        FFN,
    ),
    "a gated expert goes back through the wrong half": plant(
        "experts/feed_forward.py",
        "silu_backward(grad_hidden * up, gate)",
        "silu_backward(grad_hidden * gate, gate)",
        FFN,
    ),
    "every shard adds the output's bias": plant(
        "experts/feed_forward.py",
        "    if tensor_index == 0:  # added once",
        "    if True:  # added once",
        "run/test_shapes.py",
        4,
    ),
    "biases are those of before the step": plant(
        "gemm.py", "(self.weights, self.packs, self.biases):", "(self.weights, self.packs):", FFN
    ),
    # EXCHANGE and what carries it
    "local peers are told before the rows are there": plant(
        "comm/window.py",
        "        self.sync()\n        words[0] = exchange\n",
        "        words[0] = exchange\n        self.sync()\n",
        "comm/test_window.py",
    ),
    "a descriptor is written over while a local_peer reads it": plant(
        "comm/window.py",
        "(self.consumed[:, buffer_index] >= exchange - 2).all()",
        "(self.consumed[:, buffer_index] >= exchange - 3).all()",
        "comm/test_window.py",
    ),
    "a sum's parts are told apart by layer alone": plant(
        "comm/transport.py",
        "(exchange_tag * len(MessageKind) + kind) * max_messages + message",
        "exchange_tag * len(MessageKind) + kind",
        "comm/test_transport.py",
    ),
    "rows of two directions match": plant(
        "comm/transport.py",
        "return micro_batch * len(Direction) + direction",
        "return micro_batch * len(Direction)",
        "comm/test_transport.py",
    ),
    "a pool gives a run out twice": plant(
        "comm/pool.py",
        "[(first + count, free - count)] if free > count",
        "[(first, free - count)] if free > count",
        "comm/test_pool.py",
    ),
    "a padded row is computed from what lay there": plant(
        "dispatch/host.py",
        "plan.row_of_assignment < 0, zero, first",
        "plan.row_of_assignment < 0, first, first",
        EXCHANGE,
        3,
    ),
    "sums from other nodes are weighed twice": plant(
        "dispatch/host.py", "torch.where(torch.from_numpy(plan.is_sum), 1.0, gates.cpu())", "gates.cpu()", ORACLE, 3
    ),
    "the numbers of a landed message are another's": plant(
        "dispatch/inbound.py",
        "        gates[:] = self.window.gate_values[results]",
        "        gates[:] = self.window.gate_values[results][::-1]",
        ORACLE,
        3,
    ),
    "a batch takes the local peers' rows before this one": plant(
        "dispatch/arrivals.py",
        "counts[:, :index].sum(axis=(1, 2))",
        "counts[:, : index + 1].sum(axis=(1, 2))",
        EXCHANGE,
        3,
    ),
    "home does not wait for messages": plant(
        "dispatch/host.py",
        "        if not all(request.done for request in handle.returns):\n            return False\n",
        "",
        "dispatch/test_delays.py",
        3,
    ),
    # LANES
    "a stage's rows are written with gradients": plant(
        "pipeline/lanes.py",
        "measure(stage.report_as, lane.number), torch.no_grad():",
        "measure(stage.report_as, lane.number):",
        LANES,
    ),
    "a step's failure ends the next": plant(
        "pipeline/lanes.py", "failure, self.failure = self.failure, None", "failure = self.failure", LANES
    ),
    "experts' work goes before what others wait for": plant(
        "pipeline/lane.py", "self.stages[0][0] in _HEAVY", "self.stages[0][0] not in _HEAVY", "pipeline/test_lanes.py"
    ),
    "a rank whose experts kept nothing does not compute again": plant(
        "experts/layer.py",
        "ctx.save_for_backward(context.gates, *kept)",
        "ctx.save_for_backward(*([context.gates] * bool(context.batches)), *kept)",
        "experts/test_layer.py -k checkpointed",
    ),
    # SUMS and OPTIMIZER
    "a copy's gradient takes the others' place": plant(
        "run/gradient_sums.py",
        "                piece += row\n",
        "                piece.copy_(row)\n",
        "run/test_optimizer.py",
        3,
    ),
    "sums over groups take others' experts for their own": plant(
        "run/flat_gradients.py",
        "key=lambda entry: entry[1][1][0] != comm.rank)",
        "key=lambda entry: entry[1][1][0] == comm.rank)",
        "run/test_shapes.py -k 'dp2 and ep2 and tp1 and every_model'",
        4,
    ),
    "a bucket's end is summed again": plant(
        "run/gradient_sums.py",
        "self.num_started : end], max(end, self.num_started)",
        "self.num_started : end], self.num_started",
        "run/test_optimizer.py",
        3,
    ),
    "the norm counts every copy": plant(
        "run/gradient_sums.py",
        "[replica for replica in self.experts.held_replicas() if replica.owned]",
        "list(self.experts.held_replicas())",
        ORACLE,
        3,
    ),
    "experts are not clipped": plant(
        "run/optimizer.py",
        "            self.shared.flat *= self.train.clip_norm / norm\n",
        "",
        "run/test_optimizer.py",
        3,
    ),
    "norms and biases decay": plant(
        "run/optimizer.py",
        'if p.dim() <= 1], "weight_decay": 0.0}',
        'if p.dim() <= 1], "weight_decay": self.train.weight_decay}',
        "run/test_oracle.py -k training",
        3,
    ),
    "a step's weights are those of the step before": plant(
        "run/optimizer.py",
        "            layer.experts.local.refresh()\n        return norm",
        "            pass\n        return norm",
        "run/test_optimizer.py -k weights_of_the_last_step",
        3,
    ),
    "the learning rate warms up a step late": plant(
        "run/schedules.py", "min(1.0, step / max(", "min(1.0, (step - 1) / max(", "run/test_oracle.py -k training", 3
    ),
    "the learning rate begins to fall while it rises": plant(
        "run/schedules.py",
        "num_falling = num_steps - train.learning_rate_warmup_steps",
        "num_falling = num_steps",
        "run/test_schedules.py",
    ),
    "moments of a share lie at its first row": plant(
        "run/slices.py", "start=(first, *part.start[1:])", "start=(0, *part.start[1:])", STATE, 3
    ),
    # THE LOAD
    "biases push towards busy experts": plant(
        "model/balance.py", "np.sign(1 - utilisation)", "np.sign(utilisation - 1)", "model/test_balance.py"
    ),
    "the load forgets the past": plant(
        "model/balance.py", "(utilisation - load) / window_steps", "(utilisation - load)", "model/test_balance.py"
    ),
    # CHECKPOINTS
    "a folder has its name before its files are on disk": plant(
        "replacing.py", "        sync(partial)\n", "", "write/test_pieces.py"
    ),
    "a rank's file is not on disk when it is told": plant(
        "write/pieces.py", "        sync(path)\n", "", "write/test_pieces.py"
    ),
    "an old checkpoint is torn while it is removed": plant(
        "replacing.py",
        "        shutil.rmtree(rename_old(folder))\n",
        "        shutil.rmtree(folder)\n",
        "write/test_pieces.py write/test_checkpoint.py",
    ),
    "a hole in an array goes unseen": plant(
        "write/boxes.py", "if twice or held != size:", "if twice:", "write/test_pieces.py"
    ),
    "the oldest checkpoint stays": plant(
        "write/checkpoint.py", "earlier[:-keep] + later", "earlier[: -keep - 1] + later", "write/test_checkpoint.py"
    ),
    "an altered file passes": plant(
        "write/checksums.py",
        "if compute_digest(path) != digest_of_name[path.name]:",
        "if len(compute_digest(path)) != 64:",
        "write/test_checksums.py write/test_verify.py",
    ),
    "an optimizer's state begins at zero where there was none": plant(
        "checkpointing.py",
        "if expert not in info.absent.get(entry, [])",
        "if info is not None",
        "test_checkpointing.py -k any_optimizer",
        2,
    ),
    "every replica is saved": plant(
        "run/model_state.py",
        "mesh.data_index == 0 and experts.index(expert) == before + slot",
        "mesh.data_index == 0",
        "test_checkpointing.py -k some_ranks",
        2,
    ),
    "what is saved is not a copy": plant(
        "write/writer.py",
        "start=spec.start, array=array)",
        "start=spec.start, array=held)",
        "write/test_writer.py",
        3,
    ),
    "another model's checkpoint is taken up": plant(
        "run/metadata.py",
        "if metadata.get(key, wants) != wants]",
        "if key not in metadata]",
        "run/test_metadata.py",
    ),
    "a checkpoint of another step is taken up": plant(
        "run/metadata.py", 'metadata.get("step") != step or "num', '"num', "run/test_metadata.py"
    ),
    # CONFIG and ERRORS
    "more choices than experts": plant(
        "contradictions.py",
        "(model.top_k <= model.num_experts,",
        "(model.top_k <= model.num_experts + 1,",
        "test_config.py",
    ),
    "shards that do not divide an expert": plant(
        "contradictions.py", "model.feed_forward % max(config.parallel.tensor, 1) == 0,", "True,", "test_config.py"
    ),
    "bad input ends with a bug's status": plant(
        "output.py", "EXIT_USER = 2 ", "EXIT_USER = 1 ", "test_errors.py -k 'shared_error or names_it'"
    ),
    "the last failing rank is told in place of the first": plant(
        "errors.py", "rank, error = errors[0]", "rank, error = errors[-1]", "test_errors.py", 3
    ),
    "a wait that ran out of time says all is there": plant(
        "wait.py",
        "time.monotonic() > deadline:\n            return False",
        "time.monotonic() > deadline:\n            return True",
        "test_wait.py",
    ),
    # DATA and RECORDS
    "shares of a batch overlap": plant(
        "model/text.py",
        "num_items * (index + 1) // num_shares)",
        "num_items * (index + 1) // num_shares + 1)",
        "model/test_text.py",
    ),
    "every step reads the same text": plant(
        "model/text.py", "np.random.default_rng([seed, step])", "np.random.default_rng([seed, 0])", "model/test_text.py"
    ),
    "an epoch leaves out its last packed sequence": plant(
        "model/tokens.py",
        "(len(self) - 1) // sequence_length",
        "(len(self) - 1) // sequence_length - 1",
        "model/test_tokens.py",
    ),
    "every epoch has the same order": plant(
        "model/order.py", "num_packed, (seed, epoch))", "num_packed, (seed,))", "model/test_order.py"
    ),
    "a passage ends its document": plant(
        "model/documents.py",
        "yield Passage(text[start:end], False)",
        "yield Passage(text[start:end], True)",
        "model/test_documents.py",
    ),
    "documents run into each other": plant(
        "model/encoded.py",
        "(np.concatenate([tokens, end]) if passage.ends else tokens).data",
        "tokens.data",
        "model/test_tokens.py -k whole",
    ),
    "validation misses its last sequence": plant(
        "run/train.py",
        "// data.batch_sequences)\n    parts",
        "// data.batch_sequences)\n    starts = starts[:-1]\n    parts",
        "run/test_train.py -k validation_is_the_mean",
        3,
    ),
}
