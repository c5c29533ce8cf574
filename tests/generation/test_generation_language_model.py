import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lfs_cli.config import GenerateConfig, ModelConfig
from lfs_cli.errors import CheckpointError, ConfigError, LfsError
from lfs_cli.generation.language_model import LanguageModel, Piece, find_checkpoint
from lfs_cli.model import KVCache, Transformer, save_model
from lfs_cli.tokenizer import Tokenizer

END = "<|endoftext|>"
END_ID = 256
CONTEXT = 32


def byte_tokenizer(*specials: str) -> Tokenizer:
    return Tokenizer({byte: bytes([byte]) for byte in range(256)}, [], list(specials))


def make_model(vocab_size: int = 257, kind: type[Transformer] = Transformer) -> Any:
    torch.manual_seed(0)
    shape = {"width": 32, "layers": 2, "heads": 4, "feed_forward_width": 48}
    return kind(ModelConfig(vocab_size=vocab_size, context_length=CONTEXT, **shape))


class Scripted(Transformer):
    """Writes one text whatever it reads: byte n of `script` at position n, then the end of the text."""

    script = b""

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        start, T = cache.length if cache else 0, tokens_BT.shape[1]
        if cache:
            cache.advance(T)
        following = [*self.script, *[END_ID] * CONTEXT][start + 1 : start + T + 1]
        return 100.0 * torch.nn.functional.one_hot(torch.tensor([following] * len(tokens_BT)), 257)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def scripted(text: str) -> LanguageModel:
    model = make_model(kind=Scripted)
    model.script = text.encode()
    return LanguageModel(model, byte_tokenizer(END))


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel(make_model(), byte_tokenizer(END))


def write_checkpoint(folder: Path, **state: Any) -> Path:
    tokenizer = byte_tokenizer(END)
    save_model(make_model(), folder)
    tokenizer.save(folder)
    (folder / "state.json").write_text(json.dumps({"tokenizer_hash": tokenizer.hash, **state}))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at steps 1, 2 and 3, of which 2 is the best."""
    run = tmp_path / "runs" / "2026-11-22-tiny-a1b2"
    for step in (1, 2, 3):
        write_checkpoint(run / "checkpoints" / f"step-{step:06d}")
    (run / "checkpoints" / "latest").write_text("step-000003\n")
    (run / "checkpoints" / "best").write_text("step-000002\n")
    return run


TEXT = "aé🙂日本 fin"


def test_streaming_never_shows_half_a_character() -> None:
    pieces = list(scripted(TEXT).stream("a"))

    assert pieces == ["é", "🙂", "日", "本", " ", "f", "i", "n"]


def test_a_text_cut_inside_a_character_ends_as_decoding_says() -> None:
    model = scripted(TEXT)

    assert model.generate("a", max_tokens=4) == model.tokenizer.decode(TEXT.encode()[1:5]) == "é�"


def test_the_end_of_a_text_is_noticed_and_not_shown() -> None:
    pieces = list(scripted("abc").write(["a"], GenerateConfig()))

    assert pieces == [Piece(0, "b", 1), Piece(0, "c", 2), Piece(0, "", 2, "end of text")]


def test_without_a_stop_token_a_text_goes_on() -> None:
    assert scripted("abc").generate("a", stop=None, max_tokens=4) == f"bc{END}{END}"


def test_the_last_token_says_that_there_were_enough() -> None:
    assert list(scripted("abc").write(["a"], GenerateConfig(max_tokens=1))) == [Piece(0, "b", 1, "max_tokens")]


def test_generate_stream_and_batch_agree(language_model: LanguageModel) -> None:
    options: Any = {"max_tokens": 20, "temperature": 1.2, "top_k": 50, "min_p": 0.01, "seed": 5}

    text = language_model.generate("Once upon", **options)

    assert text == "".join(language_model.stream("Once upon", **options))
    assert text == language_model.generate_batch(["Once upon", "A"], **options)[0]
    assert text == language_model.generate("Once upon", cache=False, **options)
    assert text != language_model.generate("Once upon", **{**options, "seed": 6})


def test_an_empty_prompt_starts_after_the_end_of_a_text(language_model: LanguageModel) -> None:
    assert language_model.generate("", max_tokens=9) == language_model.generate(END, max_tokens=9)


def test_tokens_that_the_tokenizer_lacks_are_not_written() -> None:
    model = LanguageModel(make_model(vocab_size=1000), byte_tokenizer(END))

    assert model.generate("a", max_tokens=40, temperature=5.0, top_p=1.0, stop=None)


@pytest.mark.parametrize("was_training", [True, False])
def test_the_mode_of_the_model_is_restored(was_training: bool) -> None:
    model = LanguageModel(make_model().train(was_training), byte_tokenizer(END))

    model.generate("a", max_tokens=2)
    broken_off = model.stream("a")
    next(broken_off)
    broken_off.close()
    model.score("abc")

    assert model.model.training is was_training


def test_training_goes_on_after_a_sample() -> None:
    model = LanguageModel(make_model(), byte_tokenizer(END), dtype=torch.bfloat16)
    model.generate("a", max_tokens=3)

    model.model(torch.tensor([[1, 2, 3]])).sum().backward()

    assert all(weight.grad is not None for weight in model.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "`sampling.temperature` must be at least 0"),
        ({"top_p": 2.0}, "`sampling.top_p` must be at most 1"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1"),
        ({"stop": "<|end|>"}, "`stop` is `<|end|>`, which is no special token"),
    ],
)
def test_options_are_checked_as_on_the_command_line(language_model: LanguageModel, options: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        language_model.generate("a", **options)

    assert str(caught.value).startswith(message)


def test_an_unknown_option_is_a_type_error(language_model: LanguageModel) -> None:
    with pytest.raises(TypeError, match="no option `tempo`"):
        language_model.generate("a", tempo=1.0)  # pyrefly: ignore


def test_a_prompt_longer_than_the_context_names_both_numbers(language_model: LanguageModel) -> None:
    with pytest.raises(ConfigError) as caught:
        language_model.generate("once " * 10)

    assert str(caught.value) == (
        "the prompt that begins `once once once once ` has 50 tokens, and the model reads at most 32"
    )
    assert caught.value.hint == "shorten it by 18 tokens: leave out about 18 of its characters"


def test_a_prompt_as_long_as_the_context_is_continued(language_model: LanguageModel) -> None:
    assert language_model.generate("x" * CONTEXT, max_tokens=5, stop=None)


def test_without_an_end_token_texts_need_a_beginning() -> None:
    model = LanguageModel(make_model(), byte_tokenizer())

    assert model.generate("a", max_tokens=3)
    with pytest.raises(ConfigError, match="an empty prompt needs the token"):
        model.generate("")


def test_score_is_the_loss_of_the_whole_text(language_model: LanguageModel) -> None:
    text = "A short té"
    tokens = torch.tensor([END_ID, *text.encode()])

    score = language_model.score(text)

    loss = torch.nn.functional.cross_entropy(language_model.model(tokens[None, :-1])[0], tokens[1:], reduction="sum")
    assert score.nats == pytest.approx(loss.item(), rel=1e-5)
    assert (score.tokens, score.bytes) == (11, 11)
    assert score.bits_per_byte == pytest.approx(score.nats / 11 / math.log(2))
    assert score.perplexity == pytest.approx(math.exp(score.nats_per_token))


@torch.no_grad()
def test_score_of_a_long_text_predicts_each_token_from_the_window_that_writing_has() -> None:
    model = LanguageModel(make_model(), byte_tokenizer(END))
    text = "".join(chr(97 + n % 26) for n in range(90))
    tokens = [END_ID, *text.encode()]
    starts = [0] * 33 + [16] * 16 + [32] * 16 + [48] * 16 + [64] * 16

    nats = 0.0
    for place in range(1, len(tokens)):
        window = torch.tensor([tokens[starts[place] : place]])
        nats -= model.model(window)[0, -1].log_softmax(-1)[tokens[place]].item()

    assert model.score(text).nats == pytest.approx(nats, rel=1e-5)


def test_there_must_be_something_to_score(language_model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="no token to predict"):
        language_model.score("")


@pytest.mark.parametrize(
    ("checkpoint", "step"), [("best", 2), ("latest", 3), ("step-000001", 1)], ids=["best", "latest", "by name"]
)
def test_a_run_offers_its_checkpoints(run: Path, checkpoint: str, step: int) -> None:
    assert find_checkpoint(run, checkpoint) == run / "checkpoints" / f"step-{step:06d}"


def test_without_a_best_checkpoint_the_latest_is_taken(run: Path) -> None:
    (run / "checkpoints" / "best").unlink()

    assert find_checkpoint(run).name == "step-000003"


def test_a_pointer_to_a_removed_checkpoint_leads_to_the_last_one(run: Path) -> None:
    (run / "checkpoints" / "best").write_text("step-000009\n")
    (run / "checkpoints" / "latest").write_text("step-000009\n")

    assert find_checkpoint(run).name == "step-000003"


def test_a_loaded_model_writes_what_the_saved_one_wrote(run: Path) -> None:
    expected = LanguageModel(make_model(), byte_tokenizer(END)).generate("Once", max_tokens=10)

    assert LanguageModel.load(run, device="cpu").generate("Once", max_tokens=10) == expected
    assert LanguageModel.load(str(run / "checkpoints" / "step-000001")).generate("Once", max_tokens=10) == expected


def test_a_model_loads_in_the_type_asked_for(run: Path) -> None:
    model = LanguageModel.load(run, device="cpu", dtype="bfloat16")

    assert {weight.dtype for weight in model.model.parameters()} == {torch.bfloat16}
    assert model.generate("Once", max_tokens=3, stop=None)


def no_folder(run: Path) -> Path:
    return run.with_name("nothing")


def no_checkpoint(run: Path) -> Path:
    empty = run.with_name("empty")
    empty.mkdir()
    return empty


def lacks_weights(run: Path) -> Path:
    (run / "checkpoints" / "step-000002" / "model.safetensors").unlink()
    return run


def foreign_tokenizer(run: Path) -> Path:
    byte_tokenizer("<|other|>").save(run / "checkpoints" / "step-000002")
    return run


def too_many_tokens(run: Path) -> Path:
    folder = run / "checkpoints" / "step-000002"
    tokenizer = byte_tokenizer(END, "<|more|>")
    tokenizer.save(folder)
    (folder / "state.json").write_text(json.dumps({"tokenizer_hash": tokenizer.hash}))
    return run


def cut_weights(run: Path) -> Path:
    file = run / "checkpoints" / "step-000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return run


def cut_state(run: Path) -> Path:
    (run / "checkpoints" / "step-000002" / "state.json").write_text('{"tokenizer')
    return run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_folder, "no run or checkpoint at "),
        (no_checkpoint, "no checkpoint in "),
        (lacks_weights, "model.safetensors missing"),
        (foreign_tokenizer, "is not the one its model was trained with"),
        (too_many_tokens, "the tokenizer has 258 tokens and the model only 257"),
        (cut_weights, "is not a whole safetensors file"),
        (cut_state, "does not hold a JSON object"),
    ],
)
def test_what_cannot_be_loaded_is_named(run: Path, damage: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        LanguageModel.load(damage(run), device="cpu")

    assert message in str(caught.value)
    assert caught.value.hint


def test_an_unknown_checkpoint_suggests_the_nearest(run: Path) -> None:
    with pytest.raises(LfsError) as caught:
        LanguageModel.load(run, checkpoint="step-00003")

    assert caught.value.hint == "did you mean `step-000003`?"
