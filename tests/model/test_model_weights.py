"""Weights on disk: round trips, an independent reader, and every way a file can be wrong."""

import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_by_library
from safetensors.torch import save as save_by_library

from lfs_cli.config import ModelConfig
from lfs_cli.errors import CheckpointError
from lfs_cli.model import Transformer, load_model, load_state, load_weights, save_model, save_weights

CONFIG = ModelConfig(vocab_size=20, context_length=8, width=8, layers=1, heads=2, feed_forward_width=8)
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
TYPES += [torch.int8, torch.uint8, torch.bool]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from(TYPES),
    is_transposed=st.booleans(),
)
def test_any_tensors_survive_and_other_readers_agree(shapes, dtype, is_transposed) -> None:
    tensors = {f"part {index}.é": (torch.randn(shape) * 9).to(dtype) for index, shape in enumerate(shapes)}
    if is_transposed:
        tensors = {name: tensor.permute(tuple(reversed(range(tensor.dim())))) for name, tensor in tensors.items()}
    file = io.BytesIO()

    save_weights(tensors, file)

    for found in (load_weights(io.BytesIO(file.getvalue())), load_by_library(file.getvalue())):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], tensor)


def test_files_of_the_library_are_read(tmp_path) -> None:
    (tmp_path / "theirs").write_bytes(save_by_library({"a": torch.arange(6.0)}))

    assert torch.equal(load_weights(tmp_path / "theirs")["a"], torch.arange(6.0))


def test_a_model_with_every_option_is_saved_and_loaded(tmp_path) -> None:
    options = {"window": 3, "window_pattern": "SL", "logit_softcap": 2.0, "value_embeddings": 1, "layers": 2}
    options |= {"embedding_norm": True, "embedding_skip": True, "qk_norm": True}
    model = Transformer(CONFIG.model_copy(update=options))
    tokens = torch.randint(20, (2, 8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.1)

    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")

    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_model_folder_is_a_complete_model(tmp_path, is_tied) -> None:
    model = Transformer(CONFIG.model_copy(update={"tied_head": is_tied}))
    tokens = torch.randint(20, (2, 8))

    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")

    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert again.config == model.config
    assert torch.equal(again(tokens), model(tokens))
    assert all(weight.requires_grad for weight in again.parameters())
    assert ("head.weight" in load_weights(tmp_path / "model" / "model.safetensors")) != is_tied


def test_a_model_may_be_loaded_in_another_type(tmp_path) -> None:
    model = Transformer(CONFIG)
    save_model(model, tmp_path)

    half = load_model(tmp_path, dtype=torch.bfloat16)
    save_model(half, tmp_path / "half")

    assert half.norm.weight.dtype == torch.bfloat16
    assert half.blocks[0].attention.rope.cos.dtype == torch.float32
    assert load_model(tmp_path / "half").norm.weight.dtype == torch.bfloat16
    assert torch.equal(half.head.weight, model.head.weight.bfloat16())


def test_loading_a_model_leaves_the_random_numbers_alone(tmp_path) -> None:
    save_model(Transformer(CONFIG), tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    load_model(tmp_path)

    assert torch.equal(torch.rand(2), expected)


def test_a_weight_that_is_used_twice_is_stored_once() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    file = io.BytesIO()

    save_weights(module, file)
    file.seek(0)
    saved = module["a"].weight.detach().clone()
    module["a"].weight.data.zero_()
    load_state(module, file)

    assert "b.weight" not in load_by_library(file.getvalue())
    assert torch.equal(module["b"].weight, saved)


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_changed(tmp_path) -> None:
    model = Transformer(CONFIG)
    before = model.norm.weight.detach().clone()
    tensors = {**model.state_dict(), "norm.weight": torch.zeros(9), "extra": torch.zeros(1)}
    del tensors["embedding.weight"]
    save_weights(tensors, tmp_path / "wrong")

    with pytest.raises(CheckpointError) as caught:
        load_state(model, tmp_path / "wrong")

    assert str(caught.value) == (
        f"weights of {tmp_path / 'wrong'} do not fit the model: `embedding.weight` is missing; `extra` is unknown; "
        "`norm.weight` has shape [9], not [8]"
    )
    assert caught.value.hint
    assert torch.equal(model.norm.weight, before)


def damage(folder, name: str, content: bytes | None) -> None:
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "is not a model folder: `model.safetensors` missing"),
        ("config.json", None, "is not a model folder: `config.json` missing"),
        ("model.safetensors", b"", "is not a whole safetensors file"),
        ("model.safetensors", b"\x80\x04pickle" * 10, "is not a whole safetensors file"),
        ("config.json", b"{", "is not a model config: "),
        ("config.json", b'{"widht": 8}', "unknown key `widht`"),
        ("config.json", b'{"width": 24, "heads": 2}', "do not fit the model"),
    ],
    ids=str,
)
def test_a_damaged_model_folder_is_explained(tmp_path, name, content, message) -> None:
    save_model(Transformer(CONFIG), tmp_path)
    damage(tmp_path, name, content)

    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("kept", [3, 8, 50, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, kept) -> None:
    path = tmp_path / "weights"
    save_weights(Transformer(CONFIG), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])

    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_weights(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*nothing"):
        load_weights(tmp_path / "nothing")


def test_a_full_disk_leaves_the_old_file_whole_and_no_other(tmp_path, monkeypatch) -> None:
    path = tmp_path / "weights"
    save_weights({"a": torch.ones(3)}, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*weights: No space left on device"):
        save_weights({"a": torch.zeros(3)}, path)

    assert torch.equal(load_weights(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_the_header_is_json_and_the_numbers_are_aligned() -> None:
    file = io.BytesIO()
    save_weights({"b": torch.ones(2, dtype=torch.int8), "a": torch.ones(3)}, file)
    length = int.from_bytes(file.getvalue()[:8], "little")
    header = json.loads(file.getvalue()[8 : 8 + length])

    assert length % 8 == 0
    assert header["a"] == {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    assert header["b"] == {"dtype": "I8", "shape": [2], "data_offsets": [12, 14]}


def test_a_model_with_a_part_of_a_plugin_asks_for_it(tmp_path) -> None:
    save_model(Transformer(CONFIG), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "norm": "layer_norm"}))

    with pytest.raises(CheckpointError, match="has a part that is not here: unknown norm `layer_norm`") as caught:
        load_model(tmp_path)
    assert "plugins" in caught.value.hint
