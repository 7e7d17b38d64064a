"""A Hugging Face config.json read as what a prediction needs of a model: its sizes, layers and parameters.

Neither transformers nor the weights are needed; the counts are exact for the families that MATCHED names, as the tests
hold against transformers' own models, and `notes` says what is approximated for others.
"""

import os
from dataclasses import dataclass

from hpcmoe.errors import ConfigError
from hpcmoe.messages import show_value
from hpcmoe.projection.config_keys import ConfigKeys, read_config_keys
from hpcmoe.projection.layers import (
    EXPERT_WIDTHS,
    EXPERTS,
    TOP_K,
    UNGATED,
    count_layer_parameters,
    count_outer_parameters,
    find_moe_layers,
    has_dense_layers,
    is_head_tied,
    measure_shared,
    read_dense_width,
)
from hpcmoe.projection.mixers import base_family, count_heads, count_key_heads, find_linear, list_kinds, measure_head

_EXPERT_BIASES = ("gpt_oss",)
_MOST_LAYERS = 1000
MATCHED = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe",
    "phimoe", "jamba", "ernie4_5_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v32", "deepseek_v4", "glm4_moe_lite",
    "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "llama4", "dots1", "hunyuan_v1_moe", "minimax",
    "minimax_m2", "flex_olmo", "lfm2_moe", "nemotron_h", "afmoe", "exaone_moe", "solar_open", "bailing_hybrid",
    "longcat_flash", "jetmoe", "dbrx", "mimo_v2_flash", "hy_v3", "cohere2_moe", "mellum", "laguna", "zaya", "gemma4",
    "aria", "kimi_linear", "glm_moe_dsa", "axk1", "flint",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """The mixture of experts that a config.json describes."""

    family: str
    hidden: int  # H
    row_width: int  # numbers of a row that goes to an expert: H, less where a latent goes
    feed_forward: int  # F of an expert
    num_matrices: int  # of an expert: 3 where it is gated, else 2
    expert_parameters: int  # of one expert of one layer
    num_experts: int  # E
    top_k: int  # K
    moe_layers: tuple[int, ...]  # numbers of the layers that have experts
    layer_kinds: tuple[str, ...]  # [L], what mixes a layer's tokens
    layer_parameters: tuple[int, ...]  # [L], of all but the experts: attention, norms, router, shared experts
    shared_feed_forward: int  # of all shared experts of a layer together; 0: none
    dense_feed_forward: int  # of a layer without experts; 0 where all have some
    num_heads: int
    num_key_heads: int
    head_width: int
    vocabulary: int
    is_tied: bool  # the head is the embedding
    outer_parameters: int  # of embedding, head and last norm
    notes: tuple[str, ...]  # what is approximated

    @property
    def num_layers(self) -> int:
        """Return the number of layers, L."""
        return len(self.layer_parameters)

    @property
    def dense_parameters(self) -> int:
        """Return the parameters of all but the experts."""
        return sum(self.layer_parameters) + self.outer_parameters

    @property
    def num_parameters(self) -> int:
        """Return all parameters, tied ones once."""
        return self.dense_parameters + len(self.moe_layers) * self.num_experts * self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Return the parameters that a token meets."""
        return self.dense_parameters + len(self.moe_layers) * self.top_k * self.expert_parameters


def read_model(path: str | os.PathLike) -> ModelFile:
    """Read a config.json, or that of a checkpoint's folder. Raises ConfigError in one line, also for no mixture."""
    keys = read_config_keys(path)
    check_mixture(keys)
    hidden = keys.read_count("hidden_size", "d_model", "n_embd")
    kinds = list_kinds(keys, count_layers(keys))
    layers, experts, top_k = find_moe_layers(keys, kinds), keys.read_alike(*EXPERTS), keys.read_alike(*TOP_K)
    if top_k > experts:
        raise ConfigError(f"{keys.path}: {keys.find(*TOP_K)[0]} = {top_k}: must be at most the {experts} experts")
    row_width = keys.read_count("moe_latent_size", default=hidden)
    feed_forward, num_matrices = keys.read_alike(*EXPERT_WIDTHS), 2 if base_family(keys) in UNGATED else 3
    biases = (num_matrices - 1) * feed_forward + hidden if base_family(keys) in _EXPERT_BIASES else 0
    vocabulary, is_tied = keys.read_count("vocab_size"), is_head_tied(keys)
    parameters = [count_layer_parameters(keys, hidden, kinds, layers, number) for number in range(len(kinds))]
    return ModelFile(
        family=keys.family or "unknown",
        hidden=hidden,
        row_width=row_width,
        feed_forward=feed_forward,
        num_matrices=num_matrices,
        expert_parameters=num_matrices * row_width * feed_forward + biases,
        num_experts=experts,
        top_k=top_k,
        moe_layers=tuple(sorted(layers)),
        layer_kinds=tuple(kinds),
        layer_parameters=tuple(parameters),
        shared_feed_forward=measure_shared(keys, feed_forward),
        dense_feed_forward=read_dense_width(keys, has_dense_layers(keys, kinds, layers)),
        num_heads=count_heads(keys),
        num_key_heads=count_key_heads(keys),
        head_width=measure_head(keys, hidden),
        vocabulary=vocabulary,
        is_tied=is_tied,
        outer_parameters=(2 - is_tied) * vocabulary * hidden + count_outer_parameters(keys, hidden, len(kinds)),
        notes=tuple(list_notes(keys, kinds)),
    )


def check_mixture(keys: ConfigKeys) -> None:
    """Raise ConfigError in one line where a config is none of a mixture of experts."""
    name, value = keys.find(*EXPERTS)
    family = keys.family or "without model_type"
    if not name:
        raise ConfigError(f"{keys.path}: model {show_value(family)}: no {EXPERTS[0]}: not a mixture of experts")
    off = keys.find("enable_moe_block")[1] is False
    if off or value in (0, 1):
        what = "enable_moe_block = false" if off else f"{name} = {value}"
        raise ConfigError(f"{keys.path}: model {show_value(family)}: {what}: not a mixture of experts")


def count_layers(keys: ConfigKeys) -> int:
    """Return the number of layers. Raises ConfigError."""
    words = keys.read_words("layers_block_type")
    pattern = keys.find("hybrid_override_pattern")[1]
    if words or isinstance(pattern, str):
        number, name = len(words or pattern), "layers_block_type"
    else:
        names = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
        number, name = keys.read_count(*names), keys.find(*names)[0]
    if number > _MOST_LAYERS:
        raise ConfigError(f"{keys.path}: {name}: {number} layers: must be at most {_MOST_LAYERS}")
    return number


def list_notes(keys: ConfigKeys, kinds: list[str]) -> list[str]:
    """List what the counts of a model leave out or take as ordinary."""
    family, notes = base_family(keys), []
    if family not in MATCHED:
        notes.append(f"model_type {show_value(keys.family)} is not known: attention counted by its keys as ordinary")
        if "linear_attention" in kinds and find_linear(keys) is None:
            notes.append("layers of linear attention are counted as ordinary attention")
    if family == "jetmoe":
        notes.append("experts of attention are counted as dense")
    if family == "longcat_flash":
        notes.append("experts that compute nothing are not counted")
    more = keys.find("num_nextn_predict_layers", "num_mtp_layers")[1]
    if isinstance(more, int) and more > 0:
        notes.append(f"{more} layers that predict further tokens are not counted")
    return notes
