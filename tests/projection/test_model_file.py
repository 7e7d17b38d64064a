"""The parameters by a config.json are those of transformers' own model, family by family; no mixture is one line."""

import json
import sys

import pytest
from launch import ROOT, run
from tiny_families import OTHERS, TINY

from hpcmoe.errors import ConfigError
from hpcmoe.model.hf.spread import TESTED
from hpcmoe.model.hf.tiny import Widths, make_tiny, make_tiny_config
from hpcmoe.projection.model_file import read_model

FAMILIES = tuple(dict.fromkeys((*TESTED, *OTHERS)))
OTHER_WIDTHS = Widths(
    hidden=96, feed_forward=40, dense_feed_forward=56, num_layers=5, num_experts=16, num_heads=6, num_key_heads=2,
    vocabulary_size=200, num_positions=64, top_k=3,
)  # fmt: skip


def count(config):
    """Count the parameters of transformers' own model of a configuration, without memory for them."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


def read(tmp_path, config):
    """Read a config.json that holds an object, or a configuration of transformers."""
    text = json.dumps(config) if isinstance(config, dict) else config.to_json_string()
    (tmp_path / "config.json").write_text(text)
    return read_model(tmp_path / "config.json")


def rejected(tmp_path, config):
    """Read a config.json that must be rejected -> the line without the file."""
    with pytest.raises(ConfigError) as found:
        read(tmp_path, config)
    assert "\n" not in str(found.value)
    return str(found.value).removeprefix(f"{tmp_path}/config.json: ")


@pytest.mark.parametrize("widths", [OTHER_WIDTHS, pytest.param(TINY, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(tmp_path, family, widths):
    config = make_tiny_config(family, widths)
    model, wanted = read(tmp_path, config), count(config)
    if family == "longcat_flash":  # transformers keeps room for matrices of experts that compute nothing
        wanted -= model.num_layers * config.zero_expert_num * 2 * model.feed_forward * model.hidden
    assert model.num_parameters == wanted
    assert model.family == family


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "phimoe", "deepseek_v3", "glm4_moe", "hunyuan_v1_moe"])
def test_parameters_with_biases_are_those_of_transformers(tmp_path, family):
    config = make_tiny_config(family, OTHER_WIDTHS)
    config.attention_bias, config.tie_word_embeddings = True, not config.tie_word_embeddings
    assert read(tmp_path, config).num_parameters == count(config)


@pytest.mark.full
def test_a_checkpoint_folder_has_as_many_as_hpcmoe_hf_wrote(tmp_path):
    number = make_tiny("mixtral", tmp_path / "tiny", OTHER_WIDTHS)
    model = read_model(tmp_path / "tiny")
    assert model.num_parameters == number
    assert (model.hidden, model.feed_forward, model.num_layers, model.num_experts, model.top_k) == (96, 40, 5, 16, 3)


DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
    "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1, "vocab_size": 129280, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48, "num_experts": 128,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4", "text_config": {
        "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 48,
        "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "vocab_size": 202048,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions", "active", "moe_layers", "expert_megabytes"),
    [  # as the models' authors state them; bytes of an expert in bfloat16
        (DEEPSEEK_V3, 671, 37, 58, 88.1),
        (MIXTRAL, 46.7, 12.9, 32, 352),
        (QWEN3, 30.5, 3.3, 48, 9.44),
        (LLAMA4, 400, 17, 24, 251.7),
    ],
)
def test_public_models_have_the_sizes_that_their_authors_state(
    tmp_path, config, billions, active, moe_layers, expert_megabytes
):
    model = read(tmp_path, config)
    assert model.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.active_parameters / 1e9 == pytest.approx(active, rel=0.03)
    assert len(model.moe_layers) == moe_layers
    assert 2 * model.expert_parameters / 1e6 == pytest.approx(expert_megabytes, rel=0.002)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"first_k_dense_replace": 2}, [2, 3, 4, 5]),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, [2, 4]),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1]}, [1, 2, 4, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3, 5]),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 3}, [1, 2, 3]),
        ({"interleave_moe_layer_step": 3}, [2, 5]),
        ({"moe_layers": [0, 4]}, [0, 4]),
        ({"moe_layers_enum": "1,2, 5"}, [1, 2, 5]),
        ({"mlp_layer_types": ["dense", "sparse"] * 3}, [1, 3, 5]),
        ({"num_local_experts": [1, 8, 8, 8, 1, 8]}, None),
    ],
)
def test_layers_with_experts_are_found_by_the_rules_of_all_families(tmp_path, keys, layers):
    if layers is None:  # unlike numbers of experts
        assert "layers have 1 to 8: must be the same in all layers" in rejected(
            tmp_path, MIXTRAL | {"num_hidden_layers": 6} | keys
        )
    else:
        assert list(read(tmp_path, MIXTRAL | {"num_hidden_layers": 6} | keys).moe_layers) == layers


def test_a_family_that_is_not_known_says_so(tmp_path):
    model = read(tmp_path, MIXTRAL | {"model_type": "mixtral_of_tomorrow"})
    assert model.notes == ("model_type 'mixtral_of_tomorrow' is not known: attention counted by its keys as ordinary",)
    assert read(tmp_path, MIXTRAL).notes == ()
    assert read(tmp_path, DEEPSEEK_V3).notes == ("1 layers that predict further tokens are not counted",)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama", "hidden_size": 8}, "model 'llama': no num_experts: not a mixture of experts"),
        ({}, "model 'without model_type': no num_experts: not a mixture of experts"),
        (MIXTRAL | {"num_local_experts": 1}, "model 'mixtral': num_local_experts = 1: not a mixture of experts"),
        (MIXTRAL | {"enable_moe_block": False}, "model 'mixtral': enable_moe_block = false: not a mixture of experts"),
        (MIXTRAL | {"mlp_only_layers": list(range(32))}, "none of the 32 layers has experts: not a mixture of experts"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "num_experts_per_tok = 9: must be at most the 8 experts"),
        (MIXTRAL | {"hidden_size": "wide"}, "hidden_size = 'wide': must be a whole number, 1 to"),
        (MIXTRAL | {"hidden_size": -4096}, "hidden_size = -4096: must be a whole number, 1 to"),
        (MIXTRAL | {"hidden_size": 10**400}, "hidden_size = a whole number of 1329 bits: must be"),
        (MIXTRAL | {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 layers: must be at most 1000"),
        (MIXTRAL | {"vocab_size": None}, "vocab_size: missing"),
        (MIXTRAL | {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': must be true or false"),
        (MIXTRAL | {"layer_types": "full"}, "layer_types = 'full': must be a list"),
        (MIXTRAL | {"layer_types": [1]}, "layer_types = [1]: must be a list of words"),
        ({"text_config": {"text_config": {}}}, "model 'without model_type': no num_experts"),
        ([], "must hold one JSON object, not []"),
    ],
)  # fmt: skip
def test_what_is_no_mixture_of_experts_is_one_line(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as found:
        read_model(tmp_path)
    assert str(found.value).removeprefix(f"{tmp_path}/config.json: ").startswith(said)


def test_nothing_slow_is_imported_to_read_a_model_or_a_cluster(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    code = (
        "import sys, hpcmoe.placement.files.loads; from hpcmoe.projection.model_file import read_model; "
        "from hpcmoe.projection.cluster_file import read_cluster; "
        f"read_model({str(tmp_path)!r}); read_cluster({str(ROOT / 'inputs' / 'cluster.toml')!r}); "
        "print(sorted({'torch', 'mpi4py', 'mpi4py.MPI', 'transformers', 'h5py', 'numba'} & set(sys.modules)))"
    )
    shown = run(sys.executable, "-c", code)
    assert (shown.status, shown.output.strip()) == (0, "[]")
