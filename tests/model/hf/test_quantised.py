"""Checkpoints in fp8 and MXFP4 are dequantised while they are read, as transformers dequantises them."""

import json

import pytest
import torch
from spreading import open_group
from stored_models import assert_same, read_whole, save_tiny

import hpcmoe
from hpcmoe.errors import CheckpointError, ConfigError
from hpcmoe.wait import barrier

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 16]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
GROUP = 32  # numbers that share a scale in MXFP4


def edit_checkpoint(comm, folder, quantisation, edit):
    """Change the tensors of a checkpoint of one file by edit(tensors), and declare a quantisation. Collective."""
    from safetensors.torch import load_file, save_file

    if comm.rank == 0:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        declared = {"quantization_config": quantisation} if quantisation else {}
        (folder / "config.json").write_text(json.dumps(config | declared))
    barrier(comm)


def quantise_blocks(weight, rows, columns):
    """Quantise a matrix by blocks -> (in 8 bits, scales), and what both stand for, written out."""
    grid = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    stored, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(grid)
    meant = torch.empty_like(weight)
    for i in range(grid[0]):
        for j in range(grid[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[block].abs().max() / 448
            stored[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block] = stored[block].float() * scales[i, j]
    return stored, scales, meant


def is_quantised(name):
    return name.endswith("proj.weight") or "kv_a_proj" in name


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [[8, 16], [12, 20], None])  # [12, 20] divides no matrix
def test_fp8_is_dequantised_by_its_blocks(comm, shared, monkeypatch, block, dtype):
    monkeypatch.setattr("hpcmoe.model.hf.sources._PIECE_BYTES", 256)  # several pieces a matrix
    folder, whole = (save_tiny(comm, shared / name, "deepseek_v3") for name in ("saved", "whole"))

    def quantise(tensors):
        for name in list(filter(is_quantised, tensors)):
            size = block or tensors[name].shape
            tensors[name], scales, _ = quantise_blocks(tensors[name], *size)
            tensors[f"{name}_scale_inv"] = scales if block else scales[0, 0]

    def mean(tensors):
        for name in filter(is_quantised, tensors):
            tensors[name] = quantise_blocks(tensors[name], *(block or tensors[name].shape))[2]

    edit_checkpoint(comm, folder, FP8 | {"weight_block_size": block}, quantise)
    edit_checkpoint(comm, whole, None, mean)
    with open_group(comm) as group:
        prepared = hpcmoe.hf.prepare_load(folder, group, dtype=dtype)
        model = prepared.read()
        assert_same(model, read_whole(whole, dtype=dtype))
        assert not hasattr(model.config, "quantization_config")
        assert 0 < prepared.estimate.expert_read < prepared.estimate.kept / 2 and prepared.estimate.passing > 0


def test_fp8_is_dequantised_as_transformers_does():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    stored, scales, meant = quantise_blocks(torch.randn(32, 64), 8, 16)
    assert torch.equal(Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32), meant)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_dequantised_as_transformers_does(comm, shared, monkeypatch, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr("hpcmoe.model.hf.sources._PIECE_BYTES", 64)
    sizes = {"hidden_size": GROUP, "intermediate_size": 2 * GROUP}
    folder, whole = (save_tiny(comm, shared / name, "gpt_oss", **sizes) for name in ("saved", "whole"))
    generator = torch.Generator().manual_seed(3)

    def draw(name, shape):
        """Draw blocks [E, R, G, 16] and scales [E, R, G] of what is [E, 32 G, R]."""
        groups = (shape[0], shape[2], shape[1] // GROUP)
        blocks = torch.randint(256, (*groups, GROUP // 2), dtype=torch.uint8, generator=generator)
        return blocks, torch.randint(120, 128, groups, dtype=torch.uint8, generator=generator)

    def pack(tensors):
        generator.manual_seed(3)
        for name in [name for name in tensors if name.endswith("_proj")]:
            blocks, scales = draw(name, tensors.pop(name).shape)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}

    def unpack(tensors):
        generator.manual_seed(3)
        for name in [name for name in tensors if name.endswith("_proj")]:
            tensors[name] = convert_moe_packed_tensors(*draw(name, tensors[name].shape), dtype=torch.float32)

    edit_checkpoint(comm, folder, MXFP4, pack)
    edit_checkpoint(comm, whole, None, unpack)
    with open_group(comm) as group:
        prepared = hpcmoe.hf.prepare_load(folder, group, dtype=dtype)
        assert_same(prepared.read(), read_whole(whole, dtype=dtype))
        assert prepared.estimate.expert_read < prepared.estimate.kept / 2


@pytest.mark.mpi
def test_a_quantised_checkpoint_is_in_bfloat16_by_default(comm, shared):
    folder = save_tiny(comm, shared / "saved", "deepseek_v3", dtype=None)
    with open_group(comm) as group:
        if comm.rank == 0:
            config = json.loads((folder / "config.json").read_text()) | {"quantization_config": FP8}
            (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
        barrier(comm)
        model = hpcmoe.hf.load(folder, group)
        assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.mpi
def test_what_is_quantised_and_cannot_be_read_is_one_line(comm, shared):
    folder, name = save_tiny(comm, shared / "saved", "deepseek_v3"), "lm_head.weight"

    def refuse(quantisation, edit, error, match):
        edit_checkpoint(comm, folder, quantisation, edit)
        with open_group(comm) as group, pytest.raises(error, match=match) as caught:
            hpcmoe.hf.load(folder, group)
        assert "\n" not in str(caught.value)

    def quantise(tensors):
        tensors[name], tensors[f"{name}_scale_inv"], _ = quantise_blocks(tensors[name], 8, 16)

    awq = r"config.json: quant_method = 'awq': fp8 and mxfp4 are read; .* billion parameters x 4 B .* are \d+ kB"
    refuse({"quant_method": "awq"}, dict, ConfigError, awq)
    refuse({"bits": 4}, dict, ConfigError, "config.json: quantization_config.quant_method is missing")
    refuse(FP8 | {"weight_block_size": [8, 0]}, quantise, CheckpointError, r"weight_block_size = \[8, 0\]: must be")
    other = FP8 | {"weight_block_size": [8, 8]}
    refuse(other, dict, CheckpointError, rf"{name}_scale_inv: shape .*: must be \[12, 4\]")
    refuse(FP8, lambda tensors: tensors.pop(f"{name}_scale_inv"), CheckpointError, rf"{name}: .* without {name}_scale")
