"""Tiny random models of Hugging Face families of mixtures of experts, on which transformers itself is the oracle."""

import torch

# Of all families: what a configuration does not know it is not given, by its other name where it has one.
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 24, "expert_ffn_hidden_size": 16, "moe_latent_size": 16, "ffn_hidden_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k": 2, "num_selected_experts": 2, "top_k_experts": 2,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_interval": 1, "interleave_moe_layer_step": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 16, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "kv_channels": 8,
    "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "n_groups": 1, "mamba_n_groups": 1, "use_mamba_kernels": False, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
# What a family asks for besides: its kinds of layers, or what its own defaults would not let be so small.
OF_FAMILY = {
    "qwen3_next": {"num_hidden_layers": 4}, "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]}, "bailing_hybrid": {"num_hidden_layers": 8},
    "longcat_flash": {"num_layers": 2}, "flint": {"mlp_only_layers": []},
    "zaya": {"num_experts_per_tok": 1}, "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma4_text": {
        "enable_moe_block": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
        "num_hidden_layers": 6, "global_head_dim": 8,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
}  # fmt: skip


def make_config(family):
    """Make the configuration of a family's tiny model."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    known, other_names = cls().to_dict(), getattr(cls, "attribute_map", {})
    sizes = dict(SIZES)
    if "kv_lora_rank" in known:  # attention with latent keys: as many heads of keys as of queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    given = {other_names.get(name, name): value for name, value in sizes.items()}
    config = cls(**{name: value for name, value in given.items() if name in known} | OF_FAMILY.get(family, {}))
    config._attn_implementation = "eager"
    return config


def make_model(family):
    """Make a family's tiny model, the same on every rank, its matrices large enough that tokens differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(std=0.05)
            elif name.endswith("tid2eid"):  # experts by token: in a new model one expert, twice
                buffer.copy_((torch.arange(len(buffer))[:, None] + torch.arange(buffer.shape[1])) % 8)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= 4
            if name.endswith("bias"):
                parameter += 0.02 * torch.randn(parameter.shape)
    if family == "phimoe":  # routes at random in training
        return model.eval()
    return model.train()
