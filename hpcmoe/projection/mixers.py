"""The parameters of what mixes a layer's tokens, by kind: attention, latent attention, state spaces, convolutions.

Counted as transformers 5.24 builds them, held in the tests against its tiny models of every family.
"""

from collections.abc import Callable

from hpcmoe.projection.config_keys import ConfigKeys

# Families whose attention has more than its four matrices.
NORM_BY_HEAD = (  # a norm of queries and one of keys, as wide as a head
    "qwen3_moe", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_next", "qwen3_5_moe", "dots1", "hunyuan_v1_moe",
    "exaone_moe", "hy_v3", "mellum", "laguna", "flint", "lfm2_moe", "afmoe", "gemma4",
)  # fmt: skip
NORM_OF_ALL = ("olmoe", "flex_olmo", "minimax_m2")  # as wide as all heads
SINKS = ("gpt_oss", "granitemoe_swa", "flint")  # a number a head
OUTPUT_GATES = {  # numbers that a gate has for each query head of d: as many as its output, or one
    "qwen3_next": "output", "qwen3_5_moe": "output", "afmoe": "output", "laguna": "head",
}  # fmt: skip
NO_OUTPUT_BIAS = ("qwen2_moe", "glm4_moe", "mimo_v2_flash", "solar_open")  # where queries, keys and values have one


def base_family(keys: ConfigKeys) -> str:
    """Return the family's name without the suffix of a language model within another."""
    return keys.family.removesuffix("_text")


def count_mixer(keys: ConfigKeys, hidden: int, kind: str, layer: int) -> int:
    """Count the parameters of what mixes the tokens of a layer, whose kind list_kinds() tells."""
    family = base_family(keys)
    if family in BY_FAMILY:
        return BY_FAMILY[family](keys, hidden, kind)
    if kind == "conv":
        return count_short_convolution(keys, hidden)
    if kind in ("linear_attention", "mamba") and (count := find_linear(keys)):
        return count(keys, hidden)
    if keys.find("kv_lora_rank")[0]:
        return count_latent_attention(keys, hidden)
    return count_attention(keys, hidden, kind, layer)


def find_linear(keys: ConfigKeys) -> Callable[[ConfigKeys, int], int] | None:
    """Find what counts the layers of a family that are linear in the sequence, None where it is not known."""
    own = count_gated_delta if keys.find("linear_num_value_heads")[0] else None
    return LINEAR.get(base_family(keys), own)


def count_heads(keys: ConfigKeys, layer: int = 0) -> int:
    """Return the query heads of a layer."""
    by_layer = keys.read_counts("num_attention_heads_per_layer", least=1)
    if by_layer and layer < len(by_layer):
        return by_layer[layer]
    return keys.read_count("num_attention_heads", "n_heads", "n_head")


def count_key_heads(keys: ConfigKeys) -> int:
    """Return the heads of keys and values."""
    names = ("num_key_value_heads", "attn_config.kv_n_heads", "kv_n_heads", "num_kv_heads", "num_attention_groups")
    return keys.read_count(*names, default=count_heads(keys))


def measure_head(keys: ConfigKeys, hidden: int) -> int:
    """Return the width of a head."""
    return keys.read_count("head_dim", "kv_channels", default=max(hidden // count_heads(keys), 1))


def count_attention(keys: ConfigKeys, hidden: int, kind: str, layer: int) -> int:
    """Count ordinary attention: queries, keys, values, output, and what its family adds."""
    family, heads, of_head = base_family(keys), count_heads(keys, layer), measure_head(keys, hidden)
    key_heads, values_shared = count_key_heads(keys), False
    if family == "gemma4" and kind == "full_attention":
        of_head = keys.read_count("global_head_dim", default=of_head)
        values_shared = keys.read_flag("attention_k_eq_v")
        if values_shared:
            key_heads = keys.read_count("num_global_key_value_heads", default=key_heads)
    sliding = family == "mimo_v2_flash" and kind == "sliding_attention"
    if sliding:
        key_heads = keys.read_count("swa_num_key_value_heads", default=2 * key_heads)
    queries, key_width, of_value = heads * of_head, key_heads * of_head, keys.read_count("v_head_dim", default=of_head)
    values = 0 if values_shared else key_heads * of_value
    total = hidden * (queries + key_width + values) + heads * of_value * hidden

    # Add norms, sinks, gates and biases.
    if family in NORM_OF_ALL:
        total += queries + key_width
    elif family in NORM_BY_HEAD or keys.read_flag("use_qk_norm") and family == "glm4_moe":
        total += 2 * of_head
    total += heads * (family in SINKS or sliding)
    gate = OUTPUT_GATES.get(family)
    total += hidden * (queries if gate == "output" else heads if gate else 0)
    if keys.read_flag("attention_bias", "qkv_bias", "use_bias", default=family in ("gpt_oss", "qwen2_moe")):
        doubled = queries * (family in ("qwen3_next", "qwen3_5_moe"))  # whose gate is a part of the queries' matrix
        total += queries + doubled + key_width + values + hidden * (family not in NO_OUTPUT_BIAS)
    return total


def count_latent_attention(keys: ConfigKeys, hidden: int) -> int:
    """Count multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), with an indexer if there is one.

    Queries come by a latent of their own, or not.
    """
    heads, of_keys = count_heads(keys), keys.read_count("kv_lora_rank")
    rope, nope = keys.read_count("qk_rope_head_dim"), keys.read_count("qk_nope_head_dim")
    of_value, of_queries = keys.read_count("v_head_dim"), keys.read_count("q_lora_rank", default=0, least=0)
    queries = heads * (rope + nope)
    total = hidden * of_queries + of_queries + of_queries * queries if of_queries else hidden * queries
    total += hidden * (of_keys + rope) + of_keys + of_keys * heads * (nope + of_value) + heads * of_value * hidden
    if keys.read_flag("attention_bias"):
        total += of_queries + of_keys + rope + hidden

    # Add what chooses the keys that a query sees (DeepSeek-V3.2).
    index_heads = keys.read_count("index_n_heads", default=0, least=0)
    if index_heads:
        width = keys.read_count("index_head_dim")
        total += of_queries * index_heads * width + hidden * width + 2 * width + index_heads * hidden
    return total


def count_mamba(keys: ConfigKeys, hidden: int) -> int:
    """Count a Mamba layer as Jamba has it (arXiv:2312.00752, with norms of its three inputs)."""
    inner, state = keys.read_count("mamba_expand", default=2) * hidden, keys.read_count("mamba_d_state", default=16)
    name, rank = keys.find("mamba_dt_rank")
    rank = -(-hidden // 16) if rank in (None, "auto") else keys.check_count(name, rank)
    bias = keys.read_flag("mamba_proj_bias") * (2 * inner + hidden)
    convolution = inner * keys.read_count("mamba_d_conv", default=4) + inner * keys.read_flag(
        "mamba_conv_bias", default=True
    )
    matrices = 3 * inner * hidden + (rank + 2 * state) * inner + inner * rank
    return matrices + inner * state + 2 * inner + convolution + rank + 2 * state + bias


def count_mamba2(keys: ConfigKeys, hidden: int) -> int:
    """Count a Mamba-2 layer (arXiv:2405.21060)."""
    heads = keys.read_count("mamba_n_heads", "mamba_num_heads")
    name, of_head = keys.find("mamba_d_head", "mamba_head_dim")
    expanded = keys.read_count("mamba_expand", "expand", default=2) * hidden
    inner = expanded if of_head in (None, "auto") else heads * keys.check_count(name, of_head)
    groups = keys.read_count("mamba_n_groups", "n_groups", default=1)
    state = keys.read_count("mamba_d_state", "ssm_state_size", default=128)
    mixed, width = inner + 2 * groups * state, keys.read_count("mamba_d_conv", "conv_kernel", default=4)
    projected = inner + mixed + heads
    bias = keys.read_flag("use_bias", "mamba_proj_bias") * (projected + hidden)
    convolution = mixed * (width + keys.read_flag("mamba_conv_bias", "use_conv_bias", default=True))
    return hidden * (projected + inner) + convolution + 3 * heads + inner + bias


def count_gated_delta(keys: ConfigKeys, hidden: int) -> int:
    """Count a gated delta network (Qwen3-Next; arXiv:2412.06464)."""
    value_heads, of_value = keys.read_count("linear_num_value_heads"), keys.read_count("linear_value_head_dim")
    key = keys.read_count("linear_num_key_heads") * keys.read_count("linear_key_head_dim")
    value, width = value_heads * of_value, keys.read_count("linear_conv_kernel_dim", default=4)
    projected = 2 * key + 2 * value + 2 * value_heads
    return hidden * (projected + value) + (2 * key + value) * width + 2 * value_heads + of_value


def count_short_convolution(keys: ConfigKeys, hidden: int) -> int:
    """Count a gated short convolution (LFM2)."""
    bias = keys.read_flag("conv_bias") * 5 * hidden
    return hidden * keys.read_count("conv_L_cache", default=3) + 4 * hidden * hidden + bias


def count_lightning_attention(keys: ConfigKeys, hidden: int) -> int:
    """Count lightning attention (MiniMax-01, arXiv:2501.08313): queries, keys, values, a gate, a norm, the output."""
    inner = count_heads(keys) * measure_head(keys, hidden)
    return 5 * hidden * inner + inner


def count_delta_attention(keys: ConfigKeys, hidden: int, kind: str) -> int:
    """Count a layer of Bailing's or Kimi's hybrids: latent attention, or Kimi's delta attention (arXiv:2510.26692).

    Bailing's latent attention has a gate a head; Kimi's gates are products of two narrow matrices.
    """
    is_narrow, heads = base_family(keys) == "kimi_linear", count_heads(keys)
    if kind != "linear_attention":
        return count_latent_attention(keys, hidden) + heads * hidden * (not is_narrow)
    heads = keys.read_count("linear_num_heads", "linear_attn_config.num_heads", default=heads)
    of_head = keys.read_count("linear_head_dim", "linear_attn_config.head_dim", default=measure_head(keys, hidden))
    inner = heads * of_head
    gates = 2 * of_head * (hidden + inner) if is_narrow else 2 * hidden * inner
    widths = ("short_conv_kernel_size", "linear_conv_kernel_dim", "linear_attn_config.short_conv_kernel_size")
    convolutions = 3 * inner * keys.read_count(*widths, default=4)
    return 4 * hidden * inner + gates + convolutions + heads + inner + heads * hidden + of_head


def count_compressed_attention(keys: ConfigKeys, hidden: int, kind: str) -> int:
    """Count DeepSeek-V4's attention: one key head, grouped outputs, and a compressor of the past by kind."""
    heads, of_head, of_queries = count_heads(keys), measure_head(keys, hidden), keys.read_count("q_lora_rank")
    outputs = keys.read_count("o_lora_rank")
    grouped = keys.read_count("o_groups") * outputs
    total = hidden * of_queries + of_queries + of_queries * heads * of_head + hidden * of_head + of_head
    total += heads + outputs * heads * of_head + hidden * grouped
    rate = keys.read_count(f"compress_rates.{kind}", default={"compressed_sparse_attention": 4}.get(kind, 128))
    if kind == "heavily_compressed_attention":
        total += 2 * hidden * of_head + rate * of_head + of_head
    if kind == "compressed_sparse_attention":
        index_heads, width = keys.read_count("index_n_heads"), keys.read_count("index_head_dim")
        total += sum(4 * hidden * each + 2 * rate * each + each for each in (of_head, width))
        total += of_queries * index_heads * width + index_heads * hidden
    return total


def count_mixed_attention(keys: ConfigKeys, hidden: int, _kind: str) -> int:
    """Count JetMoE's attention, whose queries and outputs are experts themselves: all of them count as dense."""
    queries, experts = count_key_heads(keys) * measure_head(keys, hidden), keys.read_count("num_local_experts")
    return hidden + experts * 2 * queries * hidden + experts * hidden + 2 * queries * hidden


def count_convolved_attention(keys: ConfigKeys, hidden: int, _kind: str) -> int:
    """Count Zaya's attention on convolved queries and keys, and the scales of its residuals."""
    of_head, key_heads = measure_head(keys, hidden), count_key_heads(keys)
    queries, key_width = count_heads(keys) * of_head, key_heads * of_head
    mixed, first = queries + key_width, keys.read_count("cca_time0", default=2)
    convolutions = mixed * (first + 1) + mixed * (of_head * keys.read_count("cca_time1", default=2) + 1)
    return hidden * (2 * queries + 2 * key_width) + convolutions + key_heads + 8 * hidden


LINEAR: dict[str, Callable[[ConfigKeys, int], int]] = {
    "jamba": count_mamba, "granitemoehybrid": count_mamba2, "nemotron_h": count_mamba2,
    "minimax": count_lightning_attention, "minimax_text_01": count_lightning_attention,
}  # fmt: skip
BY_FAMILY: dict[str, Callable[[ConfigKeys, int, str], int]] = {
    "bailing_hybrid": count_delta_attention, "kimi_linear": count_delta_attention, "jetmoe": count_mixed_attention,
    "deepseek_v4": count_compressed_attention, "zaya": count_convolved_attention,
}  # fmt: skip


def list_kinds(keys: ConfigKeys, num_layers: int) -> list[str]:
    """List what mixes the tokens of each layer -> kinds [L], such as full_attention, linear_attention, moe or mlp."""
    words = keys.read_words("layer_types", "layers_block_type")
    if words is None:
        words = derive_kinds(keys, num_layers)
    words += ["full_attention"] * (num_layers - len(words))
    return ["full_attention" if word == "attention" else word for word in words[:num_layers]]


def derive_kinds(keys: ConfigKeys, num_layers: int) -> list[str]:
    """Derive the kinds of layers from the keys by which older files say them."""
    layers, family = range(num_layers), base_family(keys)
    pattern, by_number = keys.find("hybrid_override_pattern")[1], keys.read_counts("attn_type_list")
    from_one = [layer - 1 for layer in keys.read_counts("linear_attn_config.full_attn_layers") or ()]
    attending, period = keys.read_counts("full_attn_idxs"), keys.read_count("attn_layer_period", default=0, least=0)
    if isinstance(pattern, str):
        names = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
        return [names.get(letter, "full_attention") for letter in pattern]
    if by_number is not None:  # MiniMax: 1 for softmax
        return ["full_attention" if number else "linear_attention" for number in by_number]
    if from_one:  # Kimi's are numbered from 1
        return ["full_attention" if layer in from_one else "linear_attention" for layer in layers]
    if attending is not None:
        return ["full_attention" if layer in attending else "conv" for layer in layers]
    if period:
        offset = keys.read_count("attn_layer_offset", default=0, least=0)
        return ["full_attention" if layer % period == offset else "linear_attention" for layer in layers]
    every = {"qwen3_next": 4, "qwen3_5_moe": 4, "bailing_hybrid": 6}.get(family, 0)
    every = keys.read_count("full_attention_interval", "layer_group_size", default=every, least=0)
    if every:
        return ["linear_attention" if (layer + 1) % every else "full_attention" for layer in layers]
    return ["full_attention"] * num_layers
