"""A spread model's texts are transformers' own on one process, whatever ranks, batches and ends they are cut into."""

import json

import pytest
import torch
from small import make_topology
from tiny_families import make_model

import hpcmoe
from hpcmoe.errors import ConfigError
from hpcmoe.generate import continue_all
from hpcmoe.model.hf.generation import FamilyCodec, FamilyEngine, pad_left, read_codec
from hpcmoe.model.prompts import Prompt, PromptText
from hpcmoe.model.sampling import make_sampling_options
from hpcmoe.report.texts import TextReport

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

LENGTHS = (4, 11, 1, 7, 3)  # of prompts, in tokens
NEW = 9


class NoText:
    """A tokenizer of no text."""

    num_positions = None

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.fixture
def group(comm):
    with hpcmoe.open(comm, links=make_topology(comm.size), threads=1, in_flight=1, max_tokens=8) as group:
        yield group


def make_options(**changes):
    usual = {"max_new_tokens": NEW, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 7}
    return make_sampling_options("test", **(usual | changes))


def make_prompts(num_positions=999):
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in LENGTHS]
    limits = [min(NEW, num_positions - len(text)) for text in texts]
    return [
        Prompt(number=number, tokens=tuple(text), limit=limit)
        for number, (text, limit) in enumerate(zip(texts, limits, strict=True))
    ]


def run_spread(comm, model, path, options, prompts, batch):
    """Continue prompts by the model on all ranks -> {number: (tokens, finish reason)} on all. Collective."""
    report = None
    if comm.rank == 0:
        given = [PromptText(text=str(prompt.number), where="") for prompt in prompts]
        report = TextReport(given, prompts, NoText(), str(path))
    continue_all(comm, FamilyEngine(model), report, options, batch)
    comm.Barrier()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["prompt"] for entry in entries] == [str(prompt.number) for prompt in prompts]
    return {int(entry["prompt"]): (entry["tokens"], entry["finish_reason"]) for entry in entries}


def run_alone(whole, prompt, **settings):
    """Continue a prompt by transformers alone -> its tokens."""
    ids = torch.tensor([prompt.tokens])
    mask = torch.ones_like(ids)
    limit = {"max_new_tokens": prompt.limit, "do_sample": False}
    return whole.generate(ids, attention_mask=mask, **limit, **settings)[0, ids.shape[1] :].tolist()


@pytest.mark.mpi
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss", "qwen3_moe"])
def test_greedy_texts_are_transformers_own(comm, shared, group, family):
    """With ends at unlike steps, prompts of unlike lengths and limits, a rank without, and several rounds."""
    whole, prompts = make_model(family).eval(), make_prompts(num_positions=13)
    whole.set_experts_implementation("eager")
    longest = [run_alone(whole, prompt, eos_token_id=None) for prompt in prompts]
    ends = [longest[0][3], longest[1][0]]
    wanted = [run_alone(whole, prompt, eos_token_id=ends) for prompt in prompts]
    assert len({len(tokens) for tokens in wanted}) >= 3

    model = hpcmoe.hf.spread(make_model(family), group).eval()
    for batch in (1, 2, 8):
        model.generation_config.eos_token_id = ends
        found = run_spread(comm, model, shared / f"{batch}.jsonl", make_options(), prompts, batch)
        assert {number: tokens for number, (tokens, _) in found.items()} == dict(enumerate(wanted))
        for tokens, reason in found.values():
            assert reason == ("eos" if tokens[-1] in ends else "length")
    few = run_spread(comm, model, shared / "few.jsonl", make_options(), prompts[:1], 8)  # no prompt but on rank 0
    assert few[0][0] == longest[0]


@pytest.mark.mpi
def test_drawn_texts_depend_on_the_seed_alone(comm, shared, group):
    prompts, options = make_prompts(), {"temperature": 0.8, "top_k": 30, "top_p": 0.95}
    model = hpcmoe.hf.spread(make_model("mixtral"), group).eval()
    found = [
        run_spread(comm, model, shared / f"{batch}-{seed}.jsonl", make_options(**options, seed=seed), prompts, batch)
        for batch, seed in ((1, 7), (3, 7), (3, 8))
    ]
    assert found[0] == found[1] and found[1] != found[2]

    # Draw them by the scores of the whole model, one prompt after the other.
    whole = make_model("mixtral").eval()
    whole.set_experts_implementation("eager")
    alone = comm.Split(comm.rank)
    again = run_spread(alone, whole, shared / f"alone{comm.rank}.jsonl", make_options(**options), prompts, 8)
    alone.Free()
    assert again == found[0]


@pytest.mark.mpi
def test_penalties_of_a_checkpoint_count_and_its_sampling_does_not(comm, shared, group):
    whole, prompts = make_model("mixtral").eval(), make_prompts()
    model = hpcmoe.hf.spread(make_model("mixtral"), group).eval()
    plain = [run_alone(whole, prompt) for prompt in prompts]
    for each in (whole, model):
        each.generation_config.update(repetition_penalty=1.7, suppress_tokens=[plain[0][0]])
    wanted = [run_alone(whole, prompt) for prompt in prompts]
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=3)
    found = run_spread(comm, model, shared / "o.jsonl", make_options(), prompts, 8)
    assert [found[number][0] for number in range(len(prompts))] == wanted != plain


def test_rows_are_padded_on_their_left():
    ids, mask = pad_left([(5,), (6, 7, 8)])
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_tokenizer_that_is_missing_or_damaged_is_one_line(tmp_path):
    make_model("mixtral").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no tokenizer: tokenizer.json, tokenizer.model, .* is expected$"):
        read_codec(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its tokenizer cannot be read: ") as error:
        read_codec(tmp_path)
    assert "\n" not in str(error.value)


def test_a_codec_leaves_out_what_is_no_text():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="b")), bos_token="<s>", eos_token="</s>"
    )
    codec = FamilyCodec(tokenizer, 8)
    assert codec.encode("a") == [2] and codec.decode([0, 2, 1]) == "a"
