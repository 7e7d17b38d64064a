"""Small random models of a Hugging Face family, made on the spot: for tests, and to try a family before its download.

Each family's configuration has its own names for the same widths; a name that a family does not have is left out.
"""

import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcmoe.errors import ConfigError
from hpcmoe.messages import suggest
from hpcmoe.model.hf.spread import TESTED, check_version

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # of the tokenizer, numbered from 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """How large a small model is; the defaults make some 50 million parameters of a Mixtral."""

    hidden: int = 512
    feed_forward: int = 1024  # of an expert
    dense_feed_forward: int = 1536  # of the layers without experts
    num_layers: int = 4
    num_experts: int = 8
    top_k: int = 2
    num_heads: int = 8
    num_key_heads: int = 4
    vocabulary_size: int = 1024
    num_positions: int = 1024


def make_tiny_config(family: str, widths: Widths) -> Any:
    """Make the configuration of a family's model of these widths. Raises ConfigError for an unknown family."""
    check_version("hpcmoe hf")
    from transformers import CONFIG_MAPPING

    if family not in CONFIG_MAPPING:
        raise ConfigError(
            f"hpcmoe hf: {family!r}: unknown family{suggest(family, TESTED)}; such as {', '.join(TESTED)}"
        )
    cls: Any = CONFIG_MAPPING[family]
    known, other_names = cls().to_dict(), getattr(cls, "attribute_map", {})
    given = {other_names.get(name, name): value for name, value in list_sizes(widths, known).items()}
    return cls(**{name: value for name, value in given.items() if name in known} | list_more(family, widths))


def list_sizes(widths: Widths, known: dict[str, Any]) -> dict[str, Any]:
    """List every family's names for the widths; known: the names of one family."""
    w, of_head = widths, max(widths.hidden // widths.num_heads, 2)
    return {
        "vocab_size": w.vocabulary_size, "hidden_size": w.hidden, "d_model": w.hidden, "moe_latent_size": w.hidden // 2,
        "intermediate_size": w.dense_feed_forward if "moe_intermediate_size" in known else w.feed_forward,
        "moe_intermediate_size": w.feed_forward, "expert_ffn_hidden_size": w.feed_forward,
        "shared_expert_intermediate_size": w.feed_forward, "shared_intermediate_size": w.feed_forward,
        "moe_shared_expert_intermediate_size": w.feed_forward, "intermediate_size_mlp": w.dense_feed_forward,
        "ffn_hidden_size": w.dense_feed_forward, "num_hidden_layers": w.num_layers, "n_layers": w.num_layers,
        "num_layers": w.num_layers, "num_dense_layers": 1, "first_k_dense_replace": 1,
        "num_attention_heads": w.num_heads, "n_heads": w.num_heads, "head_dim": of_head, "kv_channels": of_head,
        "num_key_value_heads": w.num_heads if "kv_lora_rank" in known else w.num_key_heads,  # latent keys: of each head
        "num_experts": w.num_experts, "num_local_experts": w.num_experts, "n_routed_experts": w.num_experts,
        "moe_num_experts": w.num_experts, "zero_expert_num": 2, "num_experts_per_tok": w.top_k, "moe_k": w.top_k,
        "moe_topk": w.top_k, "top_k": w.top_k, "num_selected_experts": w.top_k, "top_k_experts": w.top_k,
        "max_position_embeddings": w.num_positions, "max_seq_len": w.num_positions, "sliding_window": w.num_positions,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_interval": 1, "interleave_moe_layer_step": 1, "mlp_only_layers": [],
        "q_lora_rank": w.hidden // 2, "kv_lora_rank": w.hidden // 2, "qk_rope_head_dim": of_head,
        "qk_nope_head_dim": of_head, "v_head_dim": of_head, "index_n_heads": 2, "index_head_dim": of_head,
        "index_topk": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2,
        "attn_layer_offset": 1, "mamba_n_heads": w.num_heads, "mamba_num_heads": w.num_heads, "mamba_d_state": 8,
        "mamba_d_head": 2 * of_head, "mamba_head_dim": 2 * of_head, "ssm_state_size": 8, "n_groups": 1,
        "mamba_n_groups": 1, "use_mamba_kernels": False, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_key_head_dim": of_head, "linear_value_head_dim": of_head,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def list_more(family: str, widths: Widths) -> dict[str, Any]:
    """List what else a family must have to be built: layers of each of its kinds, and parts that are off by default."""
    w = widths
    match family:
        case "qwen3_next" | "qwen3_5_moe_text":  # every fourth layer has full attention
            return {"num_hidden_layers": max(w.num_layers, 4)}
        case "bailing_hybrid":  # every eighth
            return {"num_hidden_layers": max(w.num_layers, 8)}
        case "granitemoehybrid":
            return {"layer_types": [("mamba", "attention")[layer % 2] for layer in range(w.num_layers)]}
        case "lfm2_moe":
            return {"layer_types": [("conv", "full_attention")[layer % 2] for layer in range(w.num_layers)]}
        case "zaya":
            return {"num_experts_per_tok": 1}
        case "gemma4_text":  # every sixth
            return {
                "enable_moe_block": True, "hidden_size_per_layer_input": w.hidden // w.num_heads,
                "vocab_size_per_layer_input": w.vocabulary_size, "num_hidden_layers": max(w.num_layers, 6),
                "global_head_dim": w.hidden // w.num_heads,
            }  # fmt: skip
        case "dbrx":
            return {
                "attn_config": {"kv_n_heads": w.num_key_heads, "rope_theta": 1e4, "clip_qkv": 8.0},
                "ffn_config": {
                    "hidden_size": w.hidden, "ffn_hidden_size": w.feed_forward, "moe_num_experts": w.num_experts,
                    "moe_top_k": w.top_k,
                },
            }  # fmt: skip
        case _:
            return {}


def make_tiny(family: str, folder: Path, widths: Widths | None = None, seed: int = 0) -> int:
    """Write a random model of a family, with a tokenizer, as a checkpoint to a new folder -> its parameters.

    Whole or not at all. Not collective. Raises ConfigError.
    """
    config = make_tiny_config(family, widths or Widths())
    import torch
    from transformers import AutoModelForCausalLM

    if folder.exists():
        raise ConfigError(f"hpcmoe hf: {folder}: is there already: name a new folder")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial") as partial:
            model.save_pretrained(whole := Path(partial, folder.name))
            make_tokenizer(config.vocab_size, config.max_position_embeddings).save_pretrained(whole)
            whole.rename(folder)
    except OSError as error:
        raise ConfigError(f"hpcmoe hf: {folder}: cannot be written: {error.strerror or error}") from None
    return sum(parameter.numel() for parameter in model.parameters())


def make_tokenizer(vocabulary_size: int, num_positions: int) -> Any:
    """Train a tokenizer of bytes and pairs of them on the source of Python's standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pad, begin, end = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train(sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py"))), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end,
        model_max_length=num_positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip
