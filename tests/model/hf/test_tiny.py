"""Small models of a family are made on the spot, with a tokenizer that gives every text back."""

import math
import string
from pathlib import Path

import pytest
import torch

from hpcmoe.errors import ConfigError
from hpcmoe.model.hf.spread import TESTED, find_top_k, list_fused
from hpcmoe.model.hf.tiny import Widths, make_tiny, make_tiny_config

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

SMALL = Widths(
    hidden=32, feed_forward=16, dense_feed_forward=24, num_layers=2, num_experts=4, num_heads=4, num_key_heads=2,
    vocabulary_size=320, num_positions=128,
)  # fmt: skip


@pytest.mark.parametrize("family", TESTED)
def test_a_family_is_made_of_the_widths_that_are_asked_for(family):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_tiny_config(family, SMALL))
    fused = list_fused(model)
    assert model.config.model_type == family and model.config.vocab_size == SMALL.vocabulary_size
    assert fused and all(len(m.down_proj) == SMALL.num_experts and find_top_k(m) == SMALL.top_k for m in fused)
    assert all(set(m.down_proj.shape[1:]) == {SMALL.hidden, SMALL.feed_forward} for m in fused)


def test_a_model_is_read_back_with_its_tokenizer(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    num_parameters = make_tiny("qwen3_moe", tmp_path / "new", SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    text = "def é(x):\n\treturn '日本' # 1" + string.punctuation
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text and len(tokenizer) == model.config.vocab_size
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(math.log(len(tokenizer)), rel=0.2)


def test_what_cannot_be_made_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"'mixtrel': unknown family; did you mean mixtral\?"):
        make_tiny("mixtrel", tmp_path / "new")
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ConfigError, match="there: is there already"):
        make_tiny("mixtral", tmp_path / "there", SMALL)
    with pytest.raises(ConfigError, match="cannot be written"):
        make_tiny("mixtral", Path("/proc/new"), SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
