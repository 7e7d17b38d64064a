"""What hpcmoe computes, without ranks: every expert on every token, weighted by a gate that is mostly zero."""

import math

import torch
from torch.nn import functional as F

NAMES = {"gelu": F.gelu, "relu": F.relu}


def expert(weights, config, layer, number, x):
    """Apply logical expert `number` of a layer to all tokens x [T, H]."""

    def linear(x, name):
        bias = weights.get(f"experts/layer{layer}/{name}_bias")
        return F.linear(x, weights[f"experts/layer{layer}/{name}"][number], None if bias is None else bias[number])

    if config.experts.kind == "swiglu":
        return linear(F.silu(linear(x, "gate")) * linear(x, "up"), "down")
    return linear(NAMES[config.experts.kind](linear(x, "up")), "down")


def attend(weights, config, prefix, x):
    """Apply causal attention by its definition, x [T, H]."""
    model = config.model
    shape = (-1, model.sequence_length, model.num_heads, model.hidden // model.num_heads)
    q, k, v = (
        part.reshape(shape).transpose(1, 2) for part in F.linear(x, weights[f"{prefix}.query_key_value"]).chunk(3, 1)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(shape[-1])
    future = torch.ones(model.sequence_length, model.sequence_length).triu(1).bool()
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    return F.linear(mixed.transpose(1, 2).reshape(x.shape), weights[f"{prefix}.attention_out"])


def norm(x, weight):
    """Apply RMSNorm by its definition, with torch's epsilon."""
    return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() * weight


def choose(config, logits, load_and_bias, groups):
    """Compute the gates of all experts [T, E], zero where not chosen or over the capacity of a group (slice) of tokens.

    load_and_bias is a layer's (load [E], bias [E]).
    """
    dispatch, (top_k, num_experts) = config.dispatch, (config.model.top_k, config.model.num_experts)
    load, bias = load_and_bias
    damped = logits - dispatch.load_feedback * load
    chosen = (damped + bias).topk(top_k).indices
    source = damped if dispatch.load_feedback_on == "both" else logits
    gates = source.softmax(-1).gather(1, chosen)
    if dispatch.renormalize and top_k != 1:  # one gate of 1 would teach the router nothing: there it is p
        gates = gates / gates.sum(-1, keepdim=True)
    keep, dropped = torch.ones_like(gates), 0
    for group in groups if dispatch.capacity_factor else ():
        taken = [0] * num_experts
        capacity = math.ceil(dispatch.capacity_factor * (group.stop - group.start) * top_k / num_experts)
        for k in range(top_k):
            for t in range(group.start, group.stop):
                taken[chosen[t, k]] += 1
                keep[t, k] = taken[chosen[t, k]] <= capacity
    dropped = int((keep == 0).sum())
    return (
        torch.zeros_like(logits).scatter(1, chosen, gates * keep),
        torch.bincount(chosen.flatten(), minlength=num_experts),
        dropped,
    )


def loss_of(weights, config, batches, load, groups_of_batch, bias=None):
    """Compute a step's whole loss -> (total, cross-entropy, assignments dropped).

    batches: [n, length + 1] of all ranks together, a micro-batch each.
    """
    dispatch, model = config.dispatch, config.model
    bias = torch.zeros_like(load) if bias is None else bias
    num_tokens = sum(len(batch) for batch in batches) * model.sequence_length
    total, entropy, dropped = 0.0, 0.0, 0
    for batch, groups in zip(batches, groups_of_batch, strict=True):
        x = (weights["dense/embedding"][batch[:, :-1]] + weights["dense/positions"]).flatten(0, 1)
        for layer in range(model.num_layers):
            prefix = f"dense/layers.{layer}.dense"
            if model.attention:
                x = x + attend(weights, config, prefix, norm(x, weights[f"{prefix}.attention_norm"]))
            inner = norm(x, weights[f"{prefix}.experts_norm"])
            logits = F.linear(inner, weights[f"dense/layers.{layer}.router.weight"])
            gates, count, lost = choose(config, logits, (load[layer], bias[layer]), groups)
            x = x + sum(gates[:, e, None] * expert(weights, config, layer, e, inner) for e in range(model.num_experts))
            shares = count / count.sum()
            total += dispatch.aux_loss_weight * model.num_experts * (shares * logits.softmax(-1).sum(0)).sum()
            total += dispatch.z_loss_weight * logits.logsumexp(-1).square().sum()
            dropped += lost
        x = F.linear(norm(x, weights["dense/last_norm"]), weights["dense/head_weight"])
        entropy = entropy + F.cross_entropy(x, batch[:, 1:].flatten(), reduction="sum")
    return (total + entropy) / num_tokens, entropy / num_tokens, dropped
