"""Tiny random models of Hugging Face families of mixtures of experts, on which transformers itself is the oracle."""

import torch

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
    "moe_k": 2, "max_position_embeddings": 64, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16, "expert_layer_period": 2,
    "expert_layer_offset": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_interval": 1,
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
    config = cls(**{name: value for name, value in given.items() if name in known})
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
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter *= 4
            if name.endswith("bias"):
                parameter += 0.02 * torch.randn(parameter.shape)
    if family == "phimoe":  # routes at random in training
        return model.eval()
    return model.train()
