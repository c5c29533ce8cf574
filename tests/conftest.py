"""Fixtures for all tests: the device, poisoned memory, the data folder, golden texts, and which tests need what."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("NO_COLOR", "1")
# Sums in a fixed order need it, and torch looks once: at the first product on a GPU, of whichever test that is
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell lets what it starts in the background ignore SIGINT, and what that starts would, too: some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected texts in tests/golden")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = {"gpu": 1, "gpus2": 2}
    marked = [(item, count) for item in items for name, count in wanted.items() if item.get_closest_marker(name)]
    if not marked:
        return
    import torch

    for item, count in marked:
        if torch.cuda.device_count() < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA GPU"))


@pytest.fixture
def device() -> str:
    """Where kernels are tested: a GPU when there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill `torch.empty` with NaN, so that a kernel that leaves an output unwritten fails loudly.

    The idea is from flash-linear-attention's tests.
    """
    import torch

    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def filled(*args, _real=real, **kwargs):
            tensor = _real(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, filled)


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, which the commands of this test use."""
    folder = tmp_path / "data"
    monkeypatch.setenv("LFS_DATA", str(folder))
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name in tests/golden, or write it with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text

    return compare
