"""Products with a weight are those of its values at this moment, by any GEMM and in any layout."""

import pytest
import torch

from hpcmoe import gemm
from hpcmoe.gemm import (
    OneDnnGemm,
    PackedGemm,
    TorchGemm,
    WeightMatrix,
    WideGemm,
    activate,
    choose_gemm,
    count_cast_bytes,
)

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of the largest number
ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found, expected, dtype):
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], error.item()


def make_gemms():
    """Whoever may multiply on some processor, and can on this one."""
    gemms = {"torch": TorchGemm(), "wide, by torch": WideGemm(TorchGemm())}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        gemms |= {"oneDNN": OneDnnGemm(), "oneDNN for few rows": PackedGemm(max_packed_rows=4)}
        gemms |= {f"wide, by {name}": WideGemm(gemms[name]) for name in ("oneDNN", "oneDNN for few rows")}
    return gemms


@pytest.fixture(params=["as this machine does", *make_gemms()], autouse=True)
def multiplier(request, monkeypatch):
    """Whatever choose_gemm finds here, and all others; oneDNN for bfloat16 only where it has it."""
    if request.param != "as this machine does":
        own = make_gemms()[request.param]
        refuses = request.param.startswith("oneDNN") and isinstance(choose_gemm("cpu", torch.bfloat16), WideGemm)
        chosen = {torch.bfloat16: WideGemm(own)} if refuses else {}
        monkeypatch.setattr(gemm, "choose_gemm", lambda device, dtype: chosen.get(dtype, own))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 70])
def test_linear_is_the_product_the_bias_and_the_activation(num_rows, dtype, packed):
    weight, bias, x = draw(20, 33), draw(20, seed=1).to(dtype), draw(num_rows, 33, seed=2).to(dtype)
    for given in (None, torch.nn.Parameter(bias)):
        matrix = WeightMatrix(torch.nn.Parameter(weight), given, packed)
        product = x.double() @ weight.to(dtype).double().T + (0 if given is None else bias.double())
        for name, function in ACTIVATIONS.items():
            y = matrix.linear(x, name)
            assert y.dtype == dtype and y.is_contiguous() and not y.requires_grad
            assert_near(y, function(product), dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_back_is_the_product_with_the_matrix_itself(dtype, packed):
    weight, grad_y = draw(20, 33), draw(7, 20, seed=2).to(dtype)
    matrix = WeightMatrix(torch.nn.Parameter(weight), packed=packed)
    back = matrix.multiply_back(grad_y)
    assert back.dtype == dtype and back.is_contiguous()
    assert_near(back, grad_y.double() @ weight.to(dtype).double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most_rows", [1024, 96])  # of one product
@pytest.mark.parametrize("piece_bytes", [2**21, 1000])
def test_gradients_add_up_in_float32(dtype, most_rows, piece_bytes, monkeypatch):
    """Over batches of one row, of less than what oneDNN takes, of just that, and of more."""
    monkeypatch.setattr(gemm, "_MAX_GRADIENT_ROWS", most_rows)
    monkeypatch.setattr(gemm, "_GRADIENT_PIECE_BYTES", piece_bytes)
    parameter = torch.nn.Parameter(draw(20, 33))
    parameter.grad = gathered = draw(20, 33, seed=1)
    expected, matrix = gathered.double(), WeightMatrix(parameter)
    for num_rows in (1, 40, 64, 128, 300):
        grad_y, x = draw(num_rows, 20, seed=num_rows).to(dtype), draw(num_rows, 33, seed=-num_rows).to(dtype)
        matrix.add_gradients(grad_y, x)
        expected = expected + grad_y.double().T @ x.double()
    assert parameter.grad is gathered and gathered.dtype == torch.float32  # in place: it may be a view of all gradients
    assert_near(gathered, expected, dtype)


def test_small_contributions_in_bfloat16_are_not_lost():
    """A sum of a thousand in bfloat16 would stop growing at 256."""
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    matrix = WeightMatrix(parameter)
    for _ in range(1000):
        matrix.add_gradients(torch.ones(64, 2, dtype=torch.bfloat16) / 64, torch.ones(64, 3, dtype=torch.bfloat16))
    assert (parameter.grad == 1000).all()


@pytest.mark.parametrize("packed", [False, True])
def test_copies_are_made_once_and_anew_after_refresh(packed):
    parameter, x, grad_y = torch.nn.Parameter(draw(64, 32)), draw(3, 32).bfloat16(), draw(3, 64).bfloat16()
    matrix = WeightMatrix(parameter, packed=packed)
    assert matrix.cast_bytes == 0
    before = matrix.linear(x), matrix.multiply_back(grad_y)
    held = matrix.cast_bytes
    assert held == parameter.numel() * count_cast_bytes(torch.bfloat16, torch.float32, packed)
    parameter.data.mul_(2)
    again = matrix.linear(x), matrix.multiply_back(grad_y)
    assert matrix.cast_bytes == held
    if gemm.choose_gemm("cpu", torch.bfloat16).precision is None:  # else the weight itself is read
        assert all(torch.equal(same, copied) for same, copied in zip(again, before, strict=True))

    matrix.refresh()
    assert matrix.cast_bytes == 0
    for new, old in zip((matrix.linear(x), matrix.multiply_back(grad_y)), before, strict=True):
        assert torch.equal(new, 2 * old)


def test_a_weight_in_its_own_precision_is_not_copied():
    matrix = WeightMatrix(torch.nn.Parameter(draw(20, 32)))
    matrix.linear(draw(5, 32))
    matrix.multiply_back(draw(5, 20))
    assert matrix.cast_bytes == 0


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="unknown activation"):
        activate(draw(1), "tanh")


def test_torch_multiplies_where_onednn_cannot_and_bfloat16_is_widened(monkeypatch):
    def refuse(x, weight, bias, activation):
        raise RuntimeError("not on this processor")

    choose = choose_gemm.__wrapped__  # which remembers nothing
    for without in (
        (torch.backends.mkldnn, "is_available", lambda: False),
        (gemm, "multiply_by_onednn", refuse),
    ):
        monkeypatch.setattr(*without)
        monkeypatch.setattr(gemm, "choose_gemm", choose)
        assert type(choose("cpu", torch.float32)) is TorchGemm
        wide = choose("cpu", torch.bfloat16)
        assert isinstance(wide, WideGemm) and type(wide.gemm) is TorchGemm
        monkeypatch.undo()
    assert type(choose("cuda", torch.bfloat16)) is TorchGemm


def test_without_avx512_many_rows_and_the_way_back_are_mkls(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    narrow = choose_gemm.__wrapped__("cpu", torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512_BF16")
    wide = choose_gemm.__wrapped__("cpu", torch.float32)
    assert type(narrow) in (PackedGemm, TorchGemm) and type(wide) in (OneDnnGemm, TorchGemm)
    if type(narrow) is PackedGemm:
        assert narrow.wants_packed(gemm._MAX_PACKED_ROWS) and not narrow.wants_packed(gemm._MAX_PACKED_ROWS + 1)
        assert wide.wants_packed(10**6)

    def refuse(*arguments):
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(gemm, "multiply_by_onednn", refuse)
    packed, x, weight, grad_y = PackedGemm(), draw(3, 33), draw(20, 33), draw(3, 20)
    assert packed.linear(x, weight, None, "gelu").shape == packed.multiply_back(x, weight.T).shape == (3, 20)
    packed.add_product(torch.zeros(20, 33), grad_y, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 70])
def test_multiply_and_its_way_back_are_autograds(num_rows, dtype):
    x, weight, grad_y = draw(num_rows, 33).to(dtype), draw(20, 33, seed=1).to(dtype), draw(num_rows, 20, seed=2)
    found, wanted = ([t.detach().to(kind).requires_grad_() for t in (x, weight)] for kind in (dtype, torch.float64))
    product = gemm.multiply(*found)
    product.backward(grad_y.to(dtype))
    expected = torch.nn.functional.linear(*wanted)
    expected.backward(grad_y.to(dtype).double())
    assert product.dtype == dtype
    for ours, theirs in ((product, expected), *((f.grad, w.grad) for f, w in zip(found, wanted, strict=True))):
        assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN")
def test_onednn_multiplies_where_it_can():
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    assert type(choose_gemm("cpu", torch.float32)) is (OneDnnGemm if wide else PackedGemm)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN")
def test_a_weight_that_rests_is_packed_once_and_read_so(monkeypatch):
    monkeypatch.setattr(gemm, "choose_gemm", choose_gemm)
    seen, multiply = [], gemm.multiply_by_onednn
    monkeypatch.setattr(gemm, "multiply_by_onednn", lambda x, w, *rest: seen.append(w) or multiply(x, w, *rest))
    matrix = WeightMatrix(torch.nn.Parameter(draw(64, 32)), packed=True)
    matrix.prepare(torch.float32)
    seen.clear()
    matrix.linear(draw(3, 32))
    matrix.linear(draw(5, 32))
    assert [weight.is_mkldnn for weight in seen] == [True, True] and seen[0] is seen[1]
