from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import leap_kernels
import pytest
import torch
from kernel_cases import BACKENDS
from leap_kernels import BackendUnavailable, _dispatch, _native, _triton, explain, leap_update, use_backend
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = {
    "accumulate_",
    "adaln_modulate",
    "adamw_8bit_step_",
    "adamw_8bit_step_many_",
    "combine_gradient_terms",
    "consistency_weighted_loss",
    "ema_update_",
    "euler_step",
    "gated_residual",
    "gelu_tanh",
    "group_norm_silu",
    "leap_distances",
    "leap_update",
    "qk_norm_rope",
    "scale_gradient",
    "stochastic_round_",
    "swiglu",
    "total_norm",
}
X = torch.ones(2, 3)


def chosen(*tensors: torch.Tensor) -> str:
    return _dispatch.choose(_dispatch._ops["euler_step"], *(tensors or (X, X)))


@pytest.fixture
def no_native_library(monkeypatch, tmp_path):
    """Make the package look as if it were installed without its library; yields where it is looked for."""
    monkeypatch.setattr(leap_kernels, "__path__", [str(tmp_path)])
    _native._load.cache_clear()
    (tmp_path / "_lib").mkdir()
    yield tmp_path / "_lib"
    monkeypatch.undo()
    _native._load.cache_clear()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets LEAP_KERNELS, as a new process would find it."""

    def set_to(name: str) -> None:
        monkeypatch.setenv("LEAP_KERNELS", name)
        _dispatch._of_the_process.cache_clear()

    yield set_to
    monkeypatch.undo()
    _dispatch._of_the_process.cache_clear()


@pytest.mark.native
def test_cpu_tensors_use_native_code_by_default() -> None:
    assert chosen() == "native"


@pytest.mark.parametrize("backend", BACKENDS)
def test_environment_and_context_manager_choose(backend: str, environment: Callable[[str], None]) -> None:
    if backend != "triton" or _triton.unavailable(X.device) is None:
        environment(backend)
        assert chosen() == backend
        with use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == backend


def test_setting_ends_with_the_block_and_stays_in_its_thread() -> None:
    seen = []
    with use_backend("reference"):
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            _ = 1 / 0
        assert chosen() == "reference"
        thread = threading.Thread(target=lambda: seen.append(_dispatch._setting().name))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_backend_is_an_error(environment: Callable[[str], None]) -> None:
    with (
        pytest.raises(ValueError, match="choose one of auto, triton, native, reference"),
        use_backend("cuda"),
    ):
        pass
    environment("fast")
    with pytest.raises(ValueError, match="LEAP_KERNELS 'fast'"):
        chosen()


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ((X.double(), X.double()), "float64"),
        ((X, X, X.half()), "one dtype"),
        ((FakeTensorMode().from_tensor(X), X), "subclass"),
        ((X.to("meta"), X.to("meta")), "need CPU tensors"),
    ],
)
def test_strict_mode_raises_the_reason_and_otherwise_the_reference_runs(tensors, reason: str, caplog) -> None:
    with use_backend("native", strict=True), pytest.raises(BackendUnavailable, match=reason):
        chosen(*tensors)
    _dispatch._logged.clear()
    with caplog.at_level(logging.INFO, "leap_kernels"), use_backend("native"):
        assert chosen(*tensors) == "reference"
        assert chosen(*tensors) == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reason in caplog.text


def test_explain_covers_every_op_in_words() -> None:
    explanations = explain()
    assert sorted((e.op, e.device) for e in explanations) == sorted((op, at) for op in OPS for at in ("cpu", "cuda"))
    assert all(len(e.reason) > 10 for e in explanations)
    with use_backend("reference"):
        assert {e.backend for e in explain() if e.device == "cpu"} == {"reference"}
        gpu = "reference" if torch.cuda.is_available() else "none"
        assert {e.backend for e in explain() if e.device == "cuda"} == {gpu}


@pytest.mark.native
def test_explain_names_the_instruction_set() -> None:
    with use_backend("native"):
        (found,) = (e for e in explain() if e.op == "leap_update" and e.device == "cpu")
    assert found.backend == "native"
    assert found.reason == _native.describe()
    assert any(isa in _native.describe() for isa in ("avx512", "avx2", "baseline"))


def test_missing_native_library_is_a_reason(no_native_library) -> None:
    assert "was not built" in _native.unavailable()
    on_cpu = [e for e in explain() if e.device == "cpu"]
    assert {e.backend for e in on_cpu} == {"reference"}
    # Of the norm PyTorch's own is native.
    assert all("was not built" in e.reason for e in on_cpu if e.op != "total_norm")
    with use_backend("native"):
        assert chosen() == "reference"
        assert torch.equal(leap_update(X, X, 1.0, 0.5)[0], X / 2)


@pytest.mark.posix
def test_unloadable_native_library_is_a_reason(no_native_library) -> None:
    (no_native_library / _native._FILE_NAME).write_bytes(b"not a library")
    assert "cannot be loaded" in _native.unavailable()


@pytest.mark.native
def test_library_of_another_version_is_refused(monkeypatch) -> None:
    _native._load.cache_clear()
    monkeypatch.setattr(_native, "ABI", 999)
    assert "reinstall" in _native.unavailable()
    _native._load.cache_clear()


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import leap_kernels
from leap_kernels import _triton
assert "cannot be imported" in _triton.MISSING
x = torch.ones(2, 3)
with leap_kernels.use_backend("triton"):
    assert torch.equal(leap_kernels.leap_update(x, x, 1.0, 0.5)[0], x / 2)
for name in ("leapalign", "diffusers", "transformers"):
    assert name not in sys.modules, name
"""


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.4.6", "needs NumPy below 2.4, not 2.4.6, or Triton 3.7"),
        ("3.6.0", "2.3.5", None),
        ("3.7.1", "2.4.6", None),
        ("3.10.0+git", "2.10.0rc1", None),
    ],
)
def test_an_interpreter_that_numpy_stops_is_a_reason(triton: str, numpy: str, reason: str | None) -> None:
    found = _triton.unfit(triton, numpy)
    assert found is None if reason is None else reason in found


def test_works_without_triton_and_imports_no_trainer() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)
