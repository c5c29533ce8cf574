import torch

from lfs_cli.model.device import choose_compile


def test_auto_compiles_on_cuda_alone_and_a_word_is_a_word() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_compile("auto", cpu) is False
    assert choose_compile(True, cpu) is True
    assert choose_compile(False, cuda) is False


def test_auto_compiles_with_triton_only(monkeypatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr("lfs_cli.model.device.find_spec", lambda name: object())
    assert choose_compile("auto", cuda) is True
    monkeypatch.setattr("lfs_cli.model.device.find_spec", lambda name: None)
    assert choose_compile("auto", cuda) is False
