"""What a run.toml may say, and what is said of each error in it: file, section, key, value, what is allowed."""

import dataclasses
import json
import re
import tomllib

import pytest
from launch import ROOT

from hpcmoe.config import Config, list_keys, read_config
from hpcmoe.errors import ConfigError
from hpcmoe.overrides import kind_of, parse_override
from hpcmoe.renamed import PLACE_OF_KEY

KINDS = {(name, key): kind_of(annotation) for name, key, annotation in list_keys()}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file that messages call run.toml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.toml"


def read(file, text, *overrides):
    """Read a run.toml of this text -> Config."""
    file.write_text(text)
    return read_config("run.toml", overrides)[0]


def refusal(file, text, *overrides):
    """Read a run.toml with errors -> the lines said of them."""
    with pytest.raises(ConfigError) as refused:
        read(file, text, *overrides)
    return str(refused.value).splitlines()


def test_an_empty_file_is_all_defaults(file):
    assert read(file, "") == Config()


def test_a_config_cannot_be_changed(file):
    config = read(file, "[model]\nhidden = 32")
    assert config.model == dataclasses.replace(Config().model, hidden=32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden = 33


def test_every_error_is_listed_at_once(file):
    text = """
        [model]
        top_k = 0
        hiden = 64
        [modle]
        [comm]
        device = "gpu"
    """
    assert sorted(refusal(file, text, "train.learning_rate=-1")) == [
        "--set train.learning_rate=-1: [train] learning_rate = -1: must be greater than 0",
        "run.toml: [comm] device = 'gpu': must be 'auto', 'host' or 'cuda'",
        "run.toml: [model] hiden = 64: unknown key; did you mean hidden?",
        "run.toml: [model] top_k = 0: must be greater than or equal to 1",
        "run.toml: [modle]: unknown section; did you mean model?",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\ntop_k = 2.0", "[model] top_k = 2.0: must be a valid integer"),
        ('[model]\ntop_k = "2"', "[model] top_k = '2': must be a valid integer"),
        ("[model]\ntop_k = true", "[model] top_k = true: must be a valid integer"),
        ("[model]\nattention = 1", "[model] attention = 1: must be a valid boolean"),
        ("[run]\nsteps = 0", "[run] steps = 0: must be greater than or equal to 1"),
        ("[run]\nseed = 9223372036854775808", "[run] seed = 9223372036854775808: must be less than"),
        ('[run]\nname = ""', "[run] name = '': String should have at least 1 character"),
        ("[train]\nlearning_rate = inf", "[train] learning_rate = inf: must be a finite number"),
        ("[train]\nlearning_rate = nan", "[train] learning_rate = nan: must be a finite number"),
        ("[train]\nbeta1 = 1.0", "[train] beta1 = 1.0: must be less than 1"),
        ("[data]\nvalidation_share = 0.0", "[data] validation_share = 0.0: must be greater than 0"),
        ("[train]\nlearning_rate_final = 1.1", "[train] learning_rate_final = 1.1: must be less than or equal to 1"),
        ("[train]\nlearning_rate_schedule = 'wsd'", "must be 'constant', 'linear', 'cosine' or 'warmup-stable-decay'"),
        ("[data]\nfiles = []", "[data] files = []: "),
        ("[data]\nfiles = ['a', 3]", "[data] files[1] = 3: must be a valid string"),
        ("[cluster]\nracks = ['a', 3]", "[cluster] racks[1] = 3: must be a valid string"),
        ("[write]\nactivations_of_layers = [-1]", "activations_of_layers[0] = -1: must be greater"),
        ("[dispatch]\nload_feedback = 1.5", "[dispatch] load_feedback = 1.5: must be less than or equal to 1"),
        ("[dispatch]\nbias_update_speed = 2.0", "[dispatch] bias_update_speed = 2.0: must be less than or equal to 1"),
        ("run = 3", "[run]: 3: must be a section"),
        ("pi = 3", "[pi]: unknown section; allowed: run, model, cluster, "),
        ("[write]\nzzz = 3", "[write] zzz = 3: unknown key; allowed: checkpoint_every, checkpoints_kept, "),
    ],
)  # fmt: skip
def test_an_error_shows_file_section_key_value_and_what_is_allowed(file, text, said):
    (line,) = refusal(file, text)
    assert line.startswith("run.toml: ") and said in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model]\ntop_k = 17", "[model] top_k = 17: must be at most num_experts = 16"),
        ("[model]\nnum_heads = 7", "[model] num_heads = 7: must divide hidden = 64"),
        ("[parallel]\ntensor = 3", "[parallel] tensor = 3: must divide [model] feed_forward = 128"),
        ('[cluster]\nlinks = "file"', "[cluster] links = 'file': must be 'measure', or a file, whose path has a / or"),
        ('[placement]\nmethod = "packd"', "[placement] method = 'packd': must be 'packed', 'contiguous', 'eplb', or"),
        ('[placement]\nloads = ""', "[placement] loads = '': must be 'uniform', or a file, whose path"),
        ('[comm]\ndevice = "host"\ntransport = "nccl"', "[comm] transport = 'nccl': needs GPUs: [comm] device ="),
        ("[train]\nlearning_rate_decay_steps = 121",
         "[train] learning_rate_decay_steps = 121: must be at most [run] steps = 120"),
        ("[pipeline]\nmicro_batches = 65", "[pipeline] micro_batches = 65: must be at most [data] batch_sequences"),
        ("[write]\nactivations_of_layers = [0, 2]",
         "[write] activations_of_layers = (0, 2): must be layers below [model] num_layers = 2"),
        ('[model]\nsource = "hf"', "[model] path = '': must be the folder of a checkpoint, for [model] source ="),
        ('[model]\nsource = "hf"\npath = "a"\nnum_experts = 8', "[model] num_experts = 8: must be left out: [model] s"),
        ('[model]\nsource = "hf"\npath = "a"\n[placement]\nmethod = "eplb"', "[placement] method = 'eplb': must be"),
    ],
)  # fmt: skip
def test_values_that_contradict_each_other_are_refused(file, text, said):
    (line,) = refusal(file, text)
    assert line.startswith(f"run.toml: {said}")


OLD = (
    "data_parallel", "expert_parallel", "tensor_parallel", "links_file", "bytes_per_second", "latency_seconds",
    "egress_bytes_per_second", "ingress_bytes_per_second", "uplink_bytes_per_second", "rack_of_node", "placement",
    "placement_file", "objective", "count_latency", "search_seconds", "search_iterations", "compare_eplb",
    "probability", "expert_probability", "loads_file", "seconds_per_token", "replicate", "spare_slots_per_rank",
    "rebalance_every", "rebalance_horizon", "rebalance_margin", "rebalance_moves",
)  # fmt: skip


@pytest.mark.parametrize("key", OLD)
def test_a_key_of_an_earlier_version_is_refused_with_its_new_place(file, key):
    assert set(OLD) == set(PLACE_OF_KEY)
    for line, source in (
        (*refusal(file, f"[cluster]\n{key} = 1"), "run.toml"),
        (*refusal(file, "", f"cluster.{key}=1"), f"--set cluster.{key}=1"),
    ):
        assert line.startswith(f"{source}: [cluster] {key} = 1: is now ")
        section, name = re.search(r"\[(\w+)\] (\w+)", line.partition("is now ")[2]).groups()
        assert (section, name) in KINDS


def test_all_contradictions_are_listed_and_each_names_its_source(file):
    assert refusal(file, "[model]\nnum_heads = 7", "model.top_k=17") == [
        "--set model.top_k=17: [model] top_k = 17: must be at most num_experts = 16",
        "run.toml: [model] num_heads = 7: must divide hidden = 64",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[model]\nnum_experts = 3\ntop_k = 3",
        "[model]\nattention = false\nnum_heads = 7",
        "[parallel]\ntensor = 128",
        '[cluster]\nlinks = "topology.json"\n[placement]\nmethod = "./packed"\nloads = "out/run/run.h5"',
        "[pipeline]\nmicro_batches = 64\ndeterministic = false",
        "[write]\nactivations_of_layers = [0, 1]",
        "[train]\nlearning_rate = 1\nclip_norm = 0\nbeta1 = 0",
    ],
)
def test_values_at_the_edge_of_what_is_allowed_pass(file, text):
    config = json.loads(json.dumps(dataclasses.asdict(read(file, text))))
    for section, keys in tomllib.loads(text).items():
        assert {key: config[section][key] for key in keys} == keys


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.hidden=32", 32),
        (" model.hidden = 32", 32),
        ("model.attention=false", False),
        ('run.name="a b"', "a b"),
        ("run.output=some/folder", "some/folder"),
        ("run.output= ../x=y ", "../x=y"),
        ("train.learning_rate=1e-3", 0.001),
        ("data.files=['a', \"b\"]", ["a", "b"]),
        ("run.name=", ""),
    ],
)
def test_an_overrides_value_is_toml_or_a_bare_string(override, value):
    name, key, parsed = parse_override(override, KINDS)
    assert f"{name}.{key}" in override and (type(parsed), parsed) == (type(value), value)


@pytest.mark.parametrize("override", ["", "model", "model.hidden", "hidden=32", "=32", ".hidden=32", "model.=32"])
def test_a_malformed_override_is_refused(file, override):
    assert refusal(file, "", override) == [f"--set {override}: must look like section.key=value"]


def test_overrides_win_over_the_file_and_later_ones_over_earlier(file):
    config = read(file, "[model]\nhidden = 32\ntop_k = 1", "model.hidden=16", "run.name=x", "model.hidden=128")
    assert (config.model.hidden, config.model.top_k, config.run.name) == (128, 1, "x")


def test_an_override_mends_an_error_of_the_file_or_brings_its_own(file):
    assert read(file, "[model]\ntop_k = 0", "model.top_k=1").model.top_k == 1
    assert refusal(file, "[model]\ntop_k = 0", "model.top_k=-1") == [
        "--set model.top_k=-1: [model] top_k = -1: must be greater than or equal to 1"
    ]
    assert refusal(file, "model = 3", "model.top_k=1") == ["run.toml: model = 3: must be a section, [model]"]


def test_an_unknown_section_of_an_override_is_laid_to_the_override(file):
    (line,) = refusal(file, "", "modle.top_k=1")
    assert line == "--set modle.top_k=1: [modle]: unknown section; did you mean model?"


def test_the_text_that_is_kept_shows_file_and_overrides(file):
    file.write_text("# mine\n[model]\nhidden = 32\n")
    _, text = read_config("run.toml", ["model.top_k=1", "run.name=x"])
    assert text.splitlines() == [
        "# mine", "[model]", "hidden = 32", "", "# --set model.top_k=1", "# --set run.name=x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[model\n", "run.toml: not TOML: "),
        (b"[model]\nhidden = 1\nhidden = 2\n", "run.toml: not TOML: "),
        (b"[model]\nname = \"\xff\"\n", "run.toml: not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_what_is_not_toml_is_refused_in_one_line(file, content, said):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{said}.*$") as refused:
        read_config("run.toml")
    assert "\n" not in str(refused.value)


def test_what_cannot_be_read_is_refused_in_one_line(file):
    with pytest.raises(ConfigError, match="^run.toml: cannot be read: No such file or directory$"):
        read_config("run.toml")
    file.mkdir()
    with pytest.raises(ConfigError, match="^run.toml: cannot be read: Is a directory$"):
        read_config("run.toml")


def test_ep16_has_the_published_sizes():
    config, _ = read_config(ROOT / "inputs" / "ep16.toml")
    model, data = config.model, config.data
    assert (model.num_experts, model.hidden, model.feed_forward, model.top_k) == (16, 8192, 32768, 2)
    assert (data.batch_sequences, model.sequence_length, model.dtype) == (1024, 10000, "bfloat16")
