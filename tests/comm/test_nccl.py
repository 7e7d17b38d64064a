"""What is there of NCCL is found as CuPy offers it, or the reason is told, and nothing else is said."""

import sys
import warnings

import pytest

from hpcmoe.comm.nccl import find_nccl

WARNS = "import warnings\nwarnings.warn('nccl library could not be loaded.')\n"
OFFERS = {
    "whole": ("available = True", None),
    "without its library": (f"{WARNS}available = False", "libnccl.so.2 is not found: pip install nvidia-nccl-cu13"),
    "not built with it": ("", "libnccl.so.2 is not found"),
    "without CUDA": ("raise ImportError('libcudart.so.13: no such file')", "CuPy cannot be imported: libcudart.so.13"),
    "without a place for its cache": ("raise OSError('read-only file system')", "CuPy cannot be imported: read-only"),
}


@pytest.fixture(params=OFFERS)
def reason(request, tmp_path, monkeypatch):
    """A CuPy that offers NCCL like this, in the real one's place if that is here -> why there is none."""
    text, reason = OFFERS[request.param]
    folder = tmp_path / "cupy" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "cupy" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "nccl.py").write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield reason
    for name in ("cupy", "cupy.cuda", "cupy.cuda.nccl"):
        sys.modules.pop(name, None)  # before the real ones are put back


def test_nccl_or_the_reason_and_no_word_of_cupys_own(reason):
    with warnings.catch_warnings(action="error"):
        nccl, why = find_nccl()
    assert (nccl is None) == (why is not None) == (reason is not None)
    if reason is None:
        assert nccl.available
    else:
        assert why.startswith(reason)
