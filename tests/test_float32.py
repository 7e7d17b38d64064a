"""What float32 makes 0, infinite or 1 is refused, for every key that is used in float32."""

import numpy as np
import pytest

from hpcmoe.config import Config, list_keys, read_config
from hpcmoe.errors import ConfigError
from hpcmoe.float32 import LARGEST_FLOAT32, SMALLEST_FLOAT32, InFloat32, find_range_error, round_to_float32

MARKED = {
    f"{name}.{key}": annotation
    for name, key, annotation in list_keys()
    if any(isinstance(mark, InFloat32) for mark in getattr(annotation, "__metadata__", ()))
}
UNBOUNDED = ["lora_alpha", "aux_loss_weight", "z_loss_weight", "learning_rate", "weight_decay", "epsilon", "clip_norm"]


@pytest.fixture
def read(tmp_path):
    """Read an empty run.toml with a --set -> Config."""
    (tmp_path / "run.toml").write_text("")
    return lambda override: read_config(tmp_path / "run.toml", [override])[0]


def test_every_number_of_the_optimizer_and_of_the_gate_is_marked():
    floats = {
        f"{n}.{k}" for n in ("train", "dispatch", "model") for k, v in vars_of(Config(), n) if isinstance(v, float)
    }
    assert floats - {"dispatch.capacity_factor"} == set(MARKED)  # which counts copies, and is multiplied in float64


def vars_of(config, name):
    """List a section's keys and values."""
    section = getattr(config, name)
    return [(key, getattr(section, key)) for key in section.__dataclass_fields__]


@pytest.mark.parametrize("key", MARKED)
@pytest.mark.parametrize("value", ["1e-50", "1e-39", "1e-300", "5e-324"])
def test_what_float32_makes_0_is_refused(read, key, value):
    zero = "" if key in ("train.learning_rate", "train.epsilon", "model.lora_alpha") else "0, or "
    with pytest.raises(
        ConfigError, match=rf"\] \w+ = {value}: must be {zero}from 1.18e-38 to 3.4e\+38, for it is used"
    ):
        read(f"{key}={value}")


@pytest.mark.parametrize("key", [key for key in MARKED if key.split(".")[1] in UNBOUNDED])
def test_what_float32_makes_infinite_is_refused(read, key):
    for value in ("1e39", "3.5e38", "1e308"):
        with pytest.raises(
            ConfigError, match=r"must be (0, or )?from 1.18e-38 to 3.4e\+38, for it is used in float32$"
        ):
            read(f"{key}={value}")


@pytest.mark.parametrize("key", ["train.beta1", "train.beta2"])
def test_what_float32_makes_1_is_refused_where_1_is(read, key):
    with pytest.raises(ConfigError, match=r"= 0.99999999: must be at most 0.99999994, for float32 makes it 1$"):
        read(f"{key}=0.99999999")
    read(f"{key}=0.99999994")


def test_what_float32_has_is_taken(read):
    for key in MARKED:
        section, name = key.split(".")
        assert getattr(getattr(read(f"{key}=1.2e-38"), section), name) == 1.2e-38
    assert read("train.weight_decay=0").train.weight_decay == 0


def test_other_numbers_keep_what_float64_has(read):
    assert read("placement.seconds_per_token=1e-50").placement.seconds_per_token == 1e-50
    assert find_range_error(1e-50, float) is None


def test_the_limits_are_those_of_float32():
    assert (np.finfo(np.float32).tiny, np.finfo(np.float32).max) == (SMALLEST_FLOAT32, LARGEST_FLOAT32)
    assert round_to_float32(0.1) == float(np.float32(0.1))
