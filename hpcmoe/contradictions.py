"""Values of run.toml that are each allowed, but not together."""


def find_contradictions(config):
    """Find values that do not fit together -> list of ((section, key), what its value must be)."""
    model, cluster, pipeline, data = config.model, config.cluster, config.pipeline, config.data
    checks = [
        (model.top_k <= model.num_experts, "model", "top_k",
         f"must be at most num_experts = {model.num_experts}"),
        (not model.attention or model.hidden % model.num_heads == 0, "model", "num_heads",
         f"must divide hidden = {model.hidden}"),
        (model.feed_forward % max(cluster.tensor_parallel, 1) == 0, "cluster", "tensor_parallel",
         f"must divide [model] feed_forward = {model.feed_forward}"),
        (cluster.links != "file" or cluster.links_file, "cluster", "links_file",
         'must name a file when links = "file"'),
        (cluster.links != "config" or cluster.bytes_per_second, "cluster", "bytes_per_second",
         'must be a matrix, nodes x nodes, when links = "config"'),
        (cluster.probability != "config" or cluster.expert_probability, "cluster", "expert_probability",
         'must be rows of [model] num_experts numbers when probability = "config"'),
        (cluster.probability != "file" or cluster.loads_file, "cluster", "loads_file",
         'must name a file when probability = "file"'),
        (cluster.placement != "file" or cluster.placement_file, "cluster", "placement_file",
         'must name a file when placement = "file"'),
        (pipeline.schedule != "arrival" or not pipeline.deterministic, "pipeline", "schedule",
         "needs deterministic = false: whichever micro-batch has rows goes on"),
        (pipeline.schedule != "arrival" or config.comm.transport != "nccl", "comm", "transport",
         'needs another [pipeline] schedule than "arrival": NCCL wants one order on all ranks'),
        (config.comm.device != "host" or config.comm.transport != "nccl", "comm", "transport",
         'needs GPUs: [comm] device = "host" has none'),
        (pipeline.micro_batches <= data.batch_sequences, "pipeline", "micro_batches",
         f"must be at most [data] batch_sequences = {data.batch_sequences}"),
        (all(layer < model.num_layers for layer in config.write.activations_of_layers), "write",
         "activations_of_layers", f"must be layers below [model] num_layers = {model.num_layers}"),
        (len(set(config.write.activations_of_layers)) == len(config.write.activations_of_layers), "write",
         "activations_of_layers", "must name each layer once"),
    ]  # fmt: skip
    return [((name, key), text) for fits, name, key, text in checks if not fits]
