"""Fixtures of the tests that need a GPU, real or fake (`fake/`). They run one after another, in under 3 minutes.

With torch, transformers, accelerate and pytest alone, the tests of the model run. Tests that need more packages name
them in the reason for which they are skipped.
"""

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_child import run_python

GPU_TESTS = Path(__file__).parent


def is_fake() -> bool:
    """Return True if the fake GPU is loaded into this process."""
    return hasattr(ctypes.CDLL(None), "fake_count")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The GPU. Without one the tests fail at once."""
    if not torch.cuda.is_available():
        pytest.exit("torch finds no GPU here: run these tests on one, or `make test-fake-gpu`", returncode=1)
    print(f"\n{torch.cuda.get_device_name()}{', fake' if is_fake() else ''}, torch {torch.__version__}")
    return torch.device("cuda")


@pytest.fixture
def real_gpu() -> Callable[[], None]:
    """Function that ends the test on the fake GPU, as skipped. What a test checks after this call are real values."""

    def need() -> None:
        if is_fake():
            pytest.skip("ran up to its values, which are garbage on the fake GPU")

    return need


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Restore the settings of torch that a test or the code under test may change for the whole process.

    The compiler forgets what it has compiled, because it refuses the ninth version of a function.
    """
    precision = torch.get_float32_matmul_precision()
    torch.compiler.reset()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Function that returns what `gpu_engines` saw in its cases under a strategy, in one process for each strategy."""

    failures: dict[str, str] = {}

    @cache
    def run(strategy: str) -> dict[str, Any] | None:
        seen = tmp_path_factory.mktemp(strategy) / "seen.pt"
        try:
            run_python(GPU_TESTS / "gpu_engines.py", strategy, seen)
        except AssertionError as error:
            failures[strategy] = str(error)
            return None
        return torch.load(seen)

    def seen_under(strategy: str) -> dict[str, Any]:
        for package in ("pydantic", "s3fs", "orjson", *(["deepspeed"] if strategy == "zero2" else [])):
            pytest.importorskip(package, reason=f"the engine under {strategy} needs {package}")
        seen = run(strategy)
        assert seen is not None, failures[strategy]
        return seen

    return seen_under
