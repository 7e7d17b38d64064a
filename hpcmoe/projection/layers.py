"""What follows attention in each layer of a config.json: experts or a dense network, router, shared experts, norms."""

from hpcmoe.errors import ConfigError
from hpcmoe.projection.config_keys import ConfigKeys
from hpcmoe.projection.mixers import base_family, count_mixer

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
    "num_selected_experts", "experts_per_token", "ffn_config.moe_top_k",
)  # fmt: skip
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_config.ffn_hidden_size", "intermediate_size")
_DENSE_WIDTHS = ("intermediate_size_mlp", "ffn_hidden_size", "intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED_WIDTHS = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
_ONE_SHARED = ("llama4", "hunyuan_v1_moe")  # which have one, as wide as an expert, and no key for it
_TIED = ("ernie4_5_moe", "lfm2_moe", "jetmoe", "cohere2_moe", "zaya", "gemma4")  # by default
_NORMS = {"phimoe": 4, "afmoe": 4, "cohere2_moe": 1, "nemotron_h": 1, "longcat_flash": 4, "gemma4": 7}  # of H; else 2
_SELECTION_BIASES = ("ernie4_5_moe", "afmoe", "laguna", "gpt_oss")  # a parameter an expert; elsewhere it is a buffer
_SPARSE = ("sparse", "moe", "hash_moe")
UNGATED = ("nemotron_h",)  # two matrices


def find_moe_layers(keys: ConfigKeys, kinds: list[str]) -> set[int]:
    """Find the layers that have experts -> their numbers. Raises ConfigError where none has."""
    number, words = len(kinds), keys.read_words("mlp_layer_types")
    listed = keys.read_counts("moe_layers")
    if "moe" in kinds:
        layers = {layer for layer, kind in enumerate(kinds) if kind == "moe"}
    elif words:
        layers = {layer for layer, word in enumerate(words[:number]) if word in _SPARSE}
    elif listed is not None:
        layers = {layer for layer in listed if layer < number}
    else:
        layers = {layer for layer in range(number) if has_experts(keys, number, layer)}
    if not layers:
        raise ConfigError(f"{keys.path}: none of the {number} layers has experts: not a mixture of experts")
    return layers


def has_experts(keys: ConfigKeys, number: int, layer: int) -> bool:
    """Return True if a layer has experts by the rules of periods, first dense layers and lists."""
    # Lists first: MiMo's moe_layer_freq has a 0 or 1 a layer, Step's moe_layers_enum is a text.
    name, listed = keys.find("moe_layers_enum", "moe_layer_freq")
    if isinstance(listed, str):
        return str(layer) in listed.replace(" ", "").split(",")
    if isinstance(listed, list):
        return layer < len(listed) and bool(listed[layer])
    by_layer = keys.find(*EXPERTS)[1]
    if isinstance(by_layer, list) and len(by_layer) == number and by_layer[layer] in (0, 1):
        return False
    if layer in (keys.read_counts("mlp_only_layers") or ()):
        return False

    # The first layers may be dense, and the experts be in every so many.
    first = keys.read_count("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", default=0, least=0)
    last = keys.find("moe_layer_end_index")[1]
    ends = isinstance(last, int) and 0 <= last < layer
    step = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step", "moe_layer_frequency")
    if layer < first or ends or (layer + 1) % keys.read_count(*step, default=1):
        return False
    if name and layer % keys.check_count(name, listed):
        return False
    period, offset = keys.read_count("expert_layer_period", default=1), keys.find("expert_layer_offset")[1]
    return period == 1 or layer % period == (
        0 if offset is None else keys.check_count("expert_layer_offset", offset, 0)
    )


def has_dense_layers(keys: ConfigKeys, kinds: list[str], layers: set[int]) -> bool:
    """Return True if a layer has a feed-forward network without experts, alone or beside them."""
    if "moe" in kinds:
        return "mlp" in kinds
    return len(layers) < len(kinds) or base_family(keys) in ("gemma4", "longcat_flash")


def read_dense_width(keys: ConfigKeys, is_needed: bool) -> int:
    """Return how wide the layers without experts are, 0 where there are none."""
    return keys.read_count(*_DENSE_WIDTHS) if is_needed else 0


def measure_shared(keys: ConfigKeys, feed_forward: int) -> int:
    """Return how wide a layer's shared experts are together, 0 where there are none."""
    family = base_family(keys)
    name, width = keys.find(*_SHARED_WIDTHS)
    if name:
        return keys.check_count(name, width, 0)
    own = keys.read_count("moe_shared_expert_intermediate_size", default=feed_forward)
    if family == "hunyuan_v1_moe":  # as wide as a layer without experts
        own = keys.read_count("intermediate_size", default=feed_forward)
    number = keys.read_alike(*_SHARED, default=1 if family in _ONE_SHARED else 0, least=0)
    return number * own


def is_head_tied(keys: ConfigKeys) -> bool:
    """Return True if the head is the embedding."""
    return keys.read_flag("tie_word_embeddings", default=base_family(keys) in _TIED)


def count_layer_parameters(keys: ConfigKeys, hidden: int, kinds: list[str], layers: set[int], number: int) -> int:
    """Count the parameters of a layer but for its experts."""
    family, kind = base_family(keys), kinds[number]
    is_sparse, is_alone = number in layers, "moe" in kinds  # alone: a layer is a mixer, a network or experts
    num_matrices = 2 if family in UNGATED else 3
    twice = 2 if family == "longcat_flash" else 1  # attention and networks, around one layer of experts
    total = _NORMS.get(family, 2) * hidden
    if not is_alone or kind not in ("moe", "mlp"):
        total += twice * count_mixer(keys, hidden, kind, number)
    if is_sparse:
        total += count_router(keys, hidden, number)
        total += num_matrices * hidden * measure_shared(keys, keys.read_alike(*EXPERT_WIDTHS))
    beside = is_sparse and family in ("gemma4", "longcat_flash")
    if beside or (kind == "mlp" if is_alone else not is_sparse):
        total += twice * num_matrices * hidden * read_dense_width(keys, True)
    return total + count_rest(keys, hidden, is_sparse)


def count_router(keys: ConfigKeys, hidden: int, number: int) -> int:
    """Count the parameters of a layer's router, of gates of its shared experts, and of projections to a latent."""
    family, experts = base_family(keys), keys.read_alike(*EXPERTS)
    if family == "zaya":
        width = keys.read_count("router_hidden_size", "zaya_mlp_expansion", default=256)
        return width * (hidden + 2 * width + experts + 1) + (4 + (number > 0)) * width
    scores = experts + keys.read_count("zero_expert_num", default=0, least=0)
    total = scores * hidden + experts * (family in _SELECTION_BIASES)
    total += hidden * (family in ("qwen2_moe", "qwen3_next", "qwen3_5_moe"))  # the shared expert's own gate
    latent = keys.read_count("moe_latent_size", default=0, least=0)
    return total + 2 * latent * hidden


def count_rest(keys: ConfigKeys, hidden: int, is_sparse: bool) -> int:
    """Count what single families have besides in a layer."""
    match base_family(keys):
        case "axk1":
            return hidden * is_sparse
        case "jetmoe":
            return hidden
        case "gemma4":  # the scales of the router, and an embedding of its own for each layer
            width = keys.read_count("hidden_size_per_layer_input", default=0, least=0)
            return hidden + keys.read_alike(*EXPERTS) + (2 * width * hidden + hidden) * (width > 0)
        case "deepseek_v4":  # hyper-connections around attention and experts
            streams = keys.read_count("hc_mult", default=4)
            mixed = streams * (streams + 2)
            return 2 * (mixed * streams * hidden + mixed + 3)
        case _:
            return 0


def count_outer_parameters(keys: ConfigKeys, hidden: int, num_layers: int) -> int:
    """Count the parameters outside of layers, but for the embedding and the head."""
    match base_family(keys):
        case "phimoe":
            return 2 * hidden
        case "zaya":
            return 3 * hidden
        case "gemma4":
            width = keys.read_count("hidden_size_per_layer_input", default=0, least=0)
            vocabulary = keys.read_count("vocab_size_per_layer_input", default=0, least=0)
            return hidden + (width > 0) * (num_layers * width * (vocabulary + hidden) + width)
        case "deepseek_v4":
            streams = keys.read_count("hc_mult", default=4)
            return hidden + streams * streams * hidden + streams + 1
        case _:
            return hidden
