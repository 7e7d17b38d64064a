"""Notes on a config: keys that were set and have no effect, and parts of a model that it leaves untrained."""

from collections.abc import Iterator

from hpcmoe.config import Config
from hpcmoe.messages import show_value

Reason = tuple[bool, str, str]  # does it hold? why; the keys, section.key, that then have no effect
_LEAST_DECAY = 2.0**-25  # of a weight, that float32 can take off it


def find_ineffective(config: Config) -> Iterator[str]:
    """Yield a line for each reason why keys that differ from their defaults have no effect, or not all they promise."""
    for part in (list_modes, list_sources, list_cluster, list_comm, list_routing, list_turns):
        for holds, why, keys in part(config):
            idle = [name_key(config, key) for key in keys.split() if holds and differs(config, key)]
            if idle:
                yield f"no effect: {', '.join(idle)}: {why}"
    yield from find_shortfalls(config)
    if config.run.mode == "train":
        yield from find_small_updates(config)
        yield from find_untrained(config) if config.model.source == "own" else ()


def differs(config: Config, name: str) -> bool:
    """Return True if a key, section.key, was set to another value than its default."""
    section, key = name.split(".")
    part = getattr(config, section)
    return getattr(part, key) != getattr(type(part)(), key)


def name_key(config: Config, name: str) -> str:
    """Write a key, section.key, with its value."""
    section, key = name.split(".")
    return f"[{section}] {key} = {show_value(getattr(getattr(config, section), key))}"


def list_modes(config: Config) -> list[Reason]:
    """List the keys that have no effect in inference, and in training."""
    infers = config.run.mode == "infer"
    return [
        (infers, '[run] mode = "infer" trains nothing',
         "train.learning_rate train.learning_rate_schedule train.learning_rate_warmup_steps "
         "train.learning_rate_decay_steps train.learning_rate_final train.weight_decay train.beta1 train.beta2 "
         "train.epsilon train.clip_norm train.bucket_bytes train.shard_optimizer train.check_every "
         "train.validate_every write.checkpoint_every write.checkpoints_kept write.asynchronous "
         "dispatch.aux_loss_weight dispatch.z_loss_weight dispatch.bias_update_speed data.validation_sequences"),
        (not infers, '[run] mode = "train" measures every step', "run.warmup_steps"),
    ]  # fmt: skip


def list_sources(config: Config) -> list[Reason]:
    """List the keys that have no effect on a model of our own, and on one of Hugging Face transformers."""
    model = config.model
    has_own_router = '[model] source = "hf" has its own router and experts'
    return [
        (model.source == "own", '[model] source = "own"',
         "model.path model.make_tiny model.trains model.lora_rank model.lora_alpha model.lora_targets model.aux_loss "
         "model.gradient_checkpointing write.hf_every"),
        (model.source == "hf" and model.trains != "lora", f'[model] trains = "{model.trains}"',
         "model.lora_rank model.lora_alpha model.lora_targets"),
        (model.source == "hf", has_own_router,
         "dispatch.renormalize dispatch.aux_loss_weight dispatch.z_loss_weight dispatch.load_feedback "
         "dispatch.load_feedback_on dispatch.load_window_steps dispatch.bias_update_speed dispatch.capacity_factor "
         "experts.kind experts.bias experts.gemm_rows"),
        (model.source == "hf", '[model] source = "hf" is a layer of the library: evenly dealt, by its own defaults',
         "comm.transport comm.buffers comm.shared_memory comm.once_per_node comm.message_rows comm.buffer_factor "
         "comm.pool_bytes placement.objective placement.count_latency placement.search_seconds "
         "placement.search_iterations placement.compare_eplb placement.loads placement.seconds_per_token "
         "placement.replicate placement.spare_slots_per_rank rebalance.horizon rebalance.margin rebalance.moves "
         "train.bucket_bytes"),
    ]  # fmt: skip


def list_cluster(config: Config) -> list[Reason]:
    """List the keys that links, placement and rebalancing leave without effect."""
    cluster, placement, still = config.cluster, config.placement, config.rebalance.every == 0
    method = f'[placement] method = "{placement.method}"'
    plain = placement.method in ("packed", "contiguous") and not placement.replicate
    return [
        (cluster.links != "measure", f"[cluster] links = {show_value(cluster.links)}",
         "cluster.measure_seconds cluster.measure_bytes"),
        (placement.method == "eplb", f"{method} is what it would compare with", "placement.compare_eplb"),
        (placement.method != "packed" and still, f"{method} is not searched for", "placement.search_iterations"),
        (still, "[rebalance] every = 0", "rebalance.horizon rebalance.margin rebalance.moves"),
        (plain and still, f"{method} with replicate = false and [rebalance] every = 0 leaves them empty",
         "placement.spare_slots_per_rank"),
        (config.parallel.expert == 1, "[parallel] expert = 1 has every expert on each rank",
         "placement.replicate rebalance.every"),
    ]  # fmt: skip


def list_comm(config: Config) -> list[Reason]:
    """List the keys of [comm] without effect: without GPUs, with GPUs alone, without other ranks."""
    comm, parallel = config.comm, config.parallel
    return [
        (comm.device == "host", '[comm] device = "host" has no GPUs', "comm.transport comm.buffers"),
        (comm.transport == "nccl", '[comm] transport = "nccl"', "comm.buffers"),
        (comm.device == "cuda", '[comm] device = "cuda": no rows are cut or shared',
         "comm.message_rows comm.pool_bytes comm.shared_memory comm.once_per_node experts.gemm_rows"),
        (parallel.expert == parallel.tensor == 1, "[parallel] expert = tensor = 1: no row leaves its rank",
         "comm.shared_memory comm.once_per_node comm.message_rows comm.buffer_factor comm.pool_bytes"),
        (not comm.shared_memory, "[comm] shared_memory = false: each rank is a node of its own", "comm.once_per_node"),
    ]  # fmt: skip


def list_routing(config: Config) -> list[Reason]:
    """List the keys of the router where the model leaves it no choice."""
    model, dispatch = config.model, config.dispatch
    every = model.top_k == model.num_experts
    no_order = every and dispatch.capacity_factor == 0  # which of a token's experts is its first matters to none
    why = f"[model] top_k = num_experts = {model.top_k} sends each token to all"
    enough = model.num_experts / model.top_k
    return [
        (not model.attention, "[model] attention = false", "model.num_heads"),
        (every, why, "dispatch.aux_loss_weight dispatch.renormalize"),
        (no_order, why, "dispatch.bias_update_speed"),
        (no_order and dispatch.load_feedback_on == "selection", why, "dispatch.load_feedback"),
        (dispatch.load_feedback == 0, "[dispatch] load_feedback = 0",
         "dispatch.load_feedback_on dispatch.load_window_steps"),
        (dispatch.capacity_factor >= enough, f"num_experts / top_k = {enough:g} is room for every token",
         "dispatch.capacity_factor"),
    ]  # fmt: skip


def list_turns(config: Config) -> list[Reason]:
    """List the keys of schedules and periods that are never used."""
    pipeline, write, schedule = config.pipeline, config.write, config.train.learning_rate_schedule
    return [
        (schedule == "constant", '[train] learning_rate_schedule = "constant"', "train.learning_rate_final"),
        (schedule != "warmup-stable-decay", f'[train] learning_rate_schedule = "{schedule}"',
         "train.learning_rate_decay_steps"),
        (pipeline.micro_batches == 1, "[pipeline] micro_batches = 1", "pipeline.schedule"),
        (pipeline.schedule == "serial", '[pipeline] schedule = "serial"', "pipeline.in_flight"),
        (write.checkpoint_every == 0, "[write] checkpoint_every = 0", "write.checkpoints_kept write.asynchronous"),
        (not config.run.trace, '[run] trace = ""', "run.trace_ranks"),
        (not write.activations_of_layers, "[write] activations_of_layers = []", "write.activations_every"),
    ]  # fmt: skip


def find_shortfalls(config: Config) -> Iterator[str]:
    """Yield a line for each key that was set to more than others let it have."""
    pipeline, steps, every = config.pipeline, config.run.steps, config.rebalance.every
    most = pipeline.in_flight if pipeline.schedule == "serial" else pipeline.micro_batches
    if pipeline.in_flight > most and differs(config, "pipeline.in_flight"):
        yield f"[pipeline] in_flight = {pipeline.in_flight} acts as micro_batches = {most}"
    if every >= steps:
        yield f"[rebalance] every = {every}: [run] steps = {steps} end before the first time"


def find_untrained(config: Config) -> Iterator[str]:
    """Yield a line for each part of the model that no gradient reaches, wholly or in most steps."""
    model, data = config.model, config.data
    if model.attention and model.sequence_length == 1:
        yield "[model] sequence_length = 1 leaves queries and keys untrained: a token attends to itself alone"
    if model.num_experts == 1 and config.dispatch.z_loss_weight == 0:
        yield "[model] num_experts = 1 leaves the routers untrained: there is nothing to choose"
    assignments = data.batch_sequences * model.sequence_length * model.top_k
    if assignments < model.num_experts:
        yield (
            f"[model] num_experts = {model.num_experts}: a step's batch_sequences {data.batch_sequences} x "
            f"sequence_length {model.sequence_length} x top_k {model.top_k} = {assignments} assignments leave some "
            "untrained"
        )


def find_small_updates(config: Config) -> Iterator[str]:
    """Yield a line for each setting that makes updates too small or too few, or leaves the rate no time to fall."""
    train, steps = config.train, config.run.steps
    warmup, schedule = train.learning_rate_warmup_steps, train.learning_rate_schedule
    if schedule != "constant" and max(steps - warmup, 0) < max(train.learning_rate_decay_steps, 1):
        yield (
            f'[train] learning_rate_schedule = "{schedule}": [run] steps = {steps} less learning_rate_warmup_steps = '
            f"{warmup} leave {max(steps - warmup, 0)} in which the rate falls"
        )
    if warmup > steps and differs(config, "train.learning_rate_warmup_steps"):
        yield (
            f"[train] learning_rate_warmup_steps = {warmup}: in [run] steps = {steps} the rate rises to "
            f"{steps / warmup:.3g} of learning_rate"
        )
    longest = train.learning_rate * (min(1.0, train.clip_norm / train.epsilon) if train.clip_norm > 0 else 1.0)
    if longest < _LEAST_DECAY:
        yield (
            f"[train] learning_rate = {train.learning_rate:g}, clip_norm = {train.clip_norm:g}, epsilon = "
            f"{train.epsilon:g}: a step is about {longest:.3g} at most, which float32 does not take off weights of 1: "
            "the norms stay untrained"
        )
    if 0 < train.learning_rate * train.weight_decay < _LEAST_DECAY:
        yield (
            f"[train] weight_decay = {train.weight_decay:g} x learning_rate = {train.learning_rate:g} is less than "
            "float32 can take off a weight: nothing decays"
        )
