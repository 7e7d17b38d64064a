"""Tiny random models of Hugging Face families of mixtures of experts, on which transformers itself is the oracle."""

import torch

from hpcmoe.model.hf.adapters import ADAPTED
from hpcmoe.model.hf.tiny import Widths, make_tiny_config

TINY = Widths(
    hidden=32, feed_forward=12, dense_feed_forward=24, num_layers=2, num_experts=8, num_heads=4, num_key_heads=2,
    vocabulary_size=96, num_positions=64,
)  # fmt: skip
OTHERS = (  # beside those that every run of the tests tries
    "qwen3_next", "qwen3_5_moe_text", "deepseek_v32", "deepseek_v4", "glm4_moe_lite", "granitemoeshared",
    "granitemoehybrid", "granitemoe_swa", "llama4_text", "dots1", "hunyuan_v1_moe", "minimax", "minimax_m2",
    "flex_olmo", "lfm2_moe", "nemotron_h", "afmoe", "exaone_moe", "solar_open", "bailing_hybrid", "longcat_flash",
    "jetmoe", "dbrx", "mimo_v2_flash", "hy_v3", "cohere2_moe", "mellum", "laguna", "zaya", "gemma4_text", "aria_text",
    "glm_moe_dsa", "axk1", "flint",
)  # fmt: skip
REGISTERED = tuple(family for family in OTHERS if family not in ADAPTED)  # run by transformers' registry


def make_config(family):
    """Make the configuration of a family's tiny model."""
    config = make_tiny_config(family, TINY)
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
