import json
import os
from pathlib import Path

import pytest
from awkward_texts import for_all, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS, Tokenizer, learn_bpe
from lfs_cli.tokenizer.formats import EXPORTS, byte_to_character, read, read_token, write_token

CORPUS = "the cat sat on the mat, the cat ate 100 cakes at the café 中文中文 <|endoftext|>" * 3
BYTES = {id: bytes([id]) for id in range(256)}


def split_by(expression: str, **changes) -> dict:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = split_by("x")["pretokenizers"][0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return Tokenizer(*learn_bpe(path, 300, ["<|endoftext|>", "<|pad|>"]), ["<|endoftext|>", "<|pad|>"])


def test_each_byte_has_a_printable_character_of_its_own() -> None:
    characters = byte_to_character()
    assert len(set(characters.values())) == len(characters) == 256
    assert all(character.isprintable() and not character.isspace() for character in characters.values())
    assert (write_token(b" the\n"), read_token("Ġtheé")) == ("ĠtheĊ", b" the\xe9")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_saving_and_loading_changes_nothing(tokenizer: Tokenizer, tmp_path: Path, pattern: str) -> None:
    ours = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern=pattern)
    ours.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = Tokenizer.load(path)
        assert (loaded.hash, loaded.pattern) == (ours.hash, pattern)
        assert loaded.special_tokens == ours.special_tokens


def test_gpt2_files_bring_everything_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab_path, merges_path = tokenizer.save_gpt2(tmp_path)
    assert Tokenizer.from_files(vocab_path, merges_path, ["<|endoftext|>", "<|pad|>"]).hash == tokenizer.hash
    assert Tokenizer.from_files(vocab_path, merges_path).special_tokens == ()
    for path in (tmp_path, vocab_path, merges_path):
        assert Tokenizer.load(path).hash == tokenizer.hash


def test_gpt2_files_with_a_prefix_are_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for path in tokenizer.save_gpt2(tmp_path):
        path.rename(path.with_name(f"mine_{path.name}"))
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
    assert Tokenizer.load(tmp_path / "mine_merges.txt").hash == tokenizer.hash


@pytest.mark.parametrize("special", ["é", "a b", "\n", "<|e|>", "中"])
def test_special_tokens_of_any_text_come_back(tmp_path: Path, special: str) -> None:
    tokenizer = Tokenizer(BYTES, [], ["<|x|>", special])
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


@for_all(text=texts)
def test_tokenizers_gives_our_ids_for_our_file(theirs_of_ours, tokenizer: Tokenizer, text: str) -> None:
    assert theirs_of_ours.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_tokenizers_gives_our_ids_for_special_tokens_anywhere(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer({**BYTES, 256: b"ab", 300: b"<|e|>"}, [(b"a", b"b")], ["<|new|>", "<|e|>"])
    theirs = tokenizers.Tokenizer.from_file(str(ours.save(tmp_path)))
    assert theirs.encode("ab<|e|><|new|>").ids == ours.encode("ab<|e|><|new|>") == [256, 300, 301]


@pytest.mark.parametrize("pattern", ["cl100k", "o200k"])
def test_tokenizers_gives_our_ids_with_other_patterns(tokenizer: Tokenizer, tmp_path: Path, pattern: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern=pattern)
    theirs = tokenizers.Tokenizer.from_file(str(ours.save(tmp_path)))
    for text in (
        CORPUS,
        "It's  12345!\n\n CamelCase'LL\n  ",
        "a\r\n\r\nb ...\n\n/x  ",
        "   \n  \n",
        "Straße ÀB中文\u3000x",
    ):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@pytest.fixture(scope="module")
def theirs_of_ours(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path_factory.mktemp("ours"))))


def test_we_give_the_ids_of_a_tokenizer_that_tokenizers_learned(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([CORPUS], vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.save_model(str(tmp_path), "old")
    text = "It's the cats' café: 12 ate <|endoftext|>\n\n中文 mats "
    for ours in (Tokenizer.load(tmp_path / "tokenizer.json"), Tokenizer.load(tmp_path / "old-vocab.json")):
        assert ours.special_tokens == ("<|endoftext|>",)
        assert ours.encode(text) == theirs.encode(text).ids


def test_gpt2_itself_loads_in_all_ways(gpt2_files: tuple[Path, Path], gpt2: Tokenizer, tmp_path: Path) -> None:
    assert gpt2.encode("Hello world<|endoftext|>") == [15496, 995, 50256]
    assert Tokenizer.load(gpt2_files[0].parent).hash == gpt2.hash
    gpt2.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == gpt2.hash


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BEGIN = {"content": "<|begin_of_text|>", **FLAGS}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [289], "tokens": ["<|begin_of_text|>"]}},
}


@pytest.mark.parametrize("merges_as", [list, " ".join])
@pytest.mark.parametrize(
    "split", [split_by(LLAMA_3), split_by(PATTERNS["cl100k"].expression, behavior="Removed", invert=True)]
)
def test_a_file_as_llama_3_has_it_gives_the_same_ids(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: dict, merges_as
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    plain = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
    path = plain.save(tmp_path)
    tree = unsealed(path)
    tree["model"] |= {"ignore_merges": True, "merges": [merges_as(merge) for merge in tree["model"]["merges"]]}
    tree |= {
        "added_tokens": [*tree["added_tokens"], {"id": tokenizer.vocab_size, **BEGIN}],
        "pre_tokenizer": split,
        "post_processor": {"type": "Sequence", "processors": [{**BYTE_LEVEL, "use_regex": True}, TEMPLATE]},
    }
    path.write_text(json.dumps(tree))
    with caplog.at_level("INFO", logger="lfs_cli.tokenizer"):
        ours = Tokenizer.load(path)
    assert "puts `<|begin_of_text|>` around each text" in caplog.text
    assert ours.special_tokens == ("<|endoftext|>", "<|pad|>", "<|begin_of_text|>")
    theirs = tokenizers.Tokenizer.from_file(str(path))
    for text in (
        CORPUS,
        "It's IT'S 12345!\n\n CamelCase'LL\n  ",
        "<|begin_of_text|>a\r\n\r\nb ...\n\n/x  ",
        "ÀB中文\u3000",
    ):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore")
def test_transformers_gives_our_ids_for_what_is_exported(tokenizer: Tokenizer, tmp_path: Path, pattern: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens, pattern=pattern)
    written = EXPORTS["huggingface"](tmp_path, ours.vocab, ours.merges, ours.special_ids, PATTERNS[pattern])
    assert [path.name for path in written] == ["tokenizer.json", "tokenizer_config.json"]
    by_file = transformers.PreTrainedTokenizerFast(tokenizer_file=str(written[0]))
    by_folder = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert by_folder.eos_token == "<|endoftext|>"
    for text in (CORPUS, "It's  12345!\n\n CamelCase'LL\n  ", "<|pad|>a\r\n\r\nb  ", "Straße ÀB中文\u3000x"):
        ids = ours.encode(text)
        assert by_file(text)["input_ids"] == by_folder(text)["input_ids"] == ids
        assert by_folder.decode(ids) == ours.decode(ids)


def test_tokens_that_merges_do_not_lead_to_are_whole_words(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tree = changed(model__ignore_merges=True, model__vocab={**BYTE_VOCAB, "abc": 257, "Ġabc": 258})
    tree |= {"pre_tokenizer": {**BYTE_LEVEL, "use_regex": True}, "decoder": BYTE_LEVEL}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    ours = Tokenizer.load(path)
    assert ours.whole_words == (b"abc", b" abc")
    assert ours.encode("abc abc abcd") == [257, 258, 32, 256, 99, 100]
    for file in (path, ours.save(tmp_path / "again")):
        theirs = tokenizers.Tokenizer.from_file(str(file))
        for text in ("abc abc abcd", "abc" * 3, "ab\nabc", "xabc"):
            assert theirs.encode(text).ids == ours.encode(text)
        assert Tokenizer.load(file).hash == ours.hash
    assert Tokenizer(ours.vocab, ours.merges).encode("abc") == [256, 99]
    with pytest.raises(DataError, match="no place for 2 tokens that no merges lead to"):
        EXPORTS["gpt2"](tmp_path, ours.vocab, ours.merges, {}, PATTERNS["gpt2"], ours.whole_words)
    with pytest.raises(DataError, match="the whole word b'xyz' is not in the vocabulary"):
        Tokenizer(BYTES, [], whole_words=[b"xyz"])


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    clash = Tokenizer(BYTES, [], ["é"])  # the byte 0xe9 is written `é`
    cl100k = Tokenizer(BYTES, [], pattern="cl100k")
    for format, tokenizer, message in (
        ("huggingface", clash, "the special token `é` is written like another token"),
        ("gpt2", clash, "two tokens are both written `é` in GPT-2's files"),
        ("gpt2", cl100k, "GPT-2's files have no place for the pattern `cl100k`"),
    ):
        pattern = PATTERNS[tokenizer.pattern]
        with pytest.raises(DataError, match=message):
            EXPORTS[format](tmp_path, tokenizer.vocab, tokenizer.merges, tokenizer.special_ids, pattern)
    assert list(tmp_path.iterdir()) == []


def test_what_a_file_says_itself_cannot_be_told_otherwise(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    assert read(path, pattern=PATTERNS["gpt2"], special_tokens=["<|pad|>"]).special_tokens[0] == "<|endoftext|>"
    with pytest.raises(DataError, match="has the pattern `gpt2`, not `cl100k`"):
        read(path, pattern=PATTERNS["cl100k"])
    with pytest.raises(DataError, match=r"has no special token `<\|x\|>`"):
        read(path, special_tokens=["<|x|>"])
    vocab_path, _ = tokenizer.save_gpt2(tmp_path)
    content = read(vocab_path, pattern=PATTERNS["o200k"], special_tokens=["<|pad|>"])
    assert (content.pattern.name, content.special_tokens) == ("o200k", ["<|pad|>"])


def test_a_file_that_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "x.tiktoken"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)  # takes no space: nothing is written
        with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes, which no tokenizer has"):
            Tokenizer.load(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a regular file"):
        Tokenizer.load(tmp_path / "pipe")


def test_a_merge_may_be_one_text_as_older_versions_write_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    tree = unsealed(path)
    tree["model"]["merges"] = [" ".join(merge) for merge in tree["model"]["merges"]]
    path.write_text(json.dumps(tree))
    assert Tokenizer.load(path).hash == tokenizer.hash


def unsealed(path: Path) -> dict:
    """Return the tree of a `tokenizer.json` that lfs wrote, as another library would pass it on."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert tree["model"].pop("checksum").startswith("sha256:")
    return tree


def outcome_of(path: Path) -> str:
    """Return the hash of the tokenizer in the file ``path``, or the error that it is refused with."""
    try:
        return Tokenizer.load(path).hash
    except DataError as error:
        return f"{error}, {error.hint}"


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_our_own_file_is_found(tokenizer: Tokenizer, tmp_path_factory, place: float, bit: int) -> None:
    path = tmp_path_factory.getbasetemp() / "sealed" / "tokenizer.json"
    raw = bytearray(tokenizer.save(path.parent).read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    path.write_bytes(raw)
    is_foreign = b'"checksum": "' not in raw  # without that name, but with all of its content
    assert f"`{path}` is" in outcome_of(path) or (is_foreign and outcome_of(path) == tokenizer.hash)


def test_a_flipped_bit_in_the_checksum_itself_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    whole = path.read_bytes()
    start = whole.index(b"sha256:")
    for place in range(start, start + len(b"sha256:") + 2):  # also in what says how it was made
        for bit in range(8):
            raw = bytearray(whole)
            raw[place] ^= 1 << bit
            path.write_bytes(raw)
            assert f"`{path}` is" in outcome_of(path)


def test_a_damaged_or_edited_file_says_what_to_do(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"the"', b'"thE"'))
    with pytest.raises(DataError, match="is damaged or was changed: it does not fit its checksum") as caught:
        Tokenizer.load(tmp_path)
    assert "remove its `checksum`" in caught.value.hint


def test_the_checksum_is_not_mistaken_for_a_token(tmp_path: Path) -> None:
    special = f'"checksum": "sha256:{"0" * 64}"'
    ours = Tokenizer(BYTES, [], [special])
    tokenizers = pytest.importorskip("tokenizers")
    path = ours.save(tmp_path)
    assert Tokenizer.load(path).special_tokens == (special,)
    assert tokenizers.Tokenizer.from_file(str(path)).encode(special).ids == [256]


def changed(**changes) -> dict:
    """Return the tree of a `tokenizer.json` with some values replaced; `a__b` is `b` inside `a`."""
    vocab = {write_token(token): id for id, token in BYTES.items()} | {"ab": 256}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}
    tree = {"added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}, "model": model}
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            tree[outer][inner] = value
        else:
            tree[outer] = value
    return tree


ADDED = {"id": 257, "content": "<|e|>", "special": True}
BYTE_VOCAB = changed()["model"]["vocab"]


def test_the_tree_that_the_table_changes_is_good(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(added_tokens=[ADDED])))
    assert Tokenizer.load(tmp_path).encode("ab<|e|>") == [256, 257]


BAD_TREES = {
    "no object": ([1, 2], "does not hold an object"),
    "no model": ({}, "does not hold a `model`"),
    "another model": (changed(model__type="WordPiece"), "asks for the model `WordPiece`"),
    "a normalizer": (changed(normalizer={"type": "NFC"}), "asks for a normalizer"),
    "byte fallback": (changed(model__byte_fallback=True), "asks for `byte_fallback`"),
    "a suffix": (changed(model__end_of_word_suffix="</w>"), "asks for `end_of_word_suffix`"),
    "a prefix space": (changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "`add_prefix_space`"),
    "no words": (changed(pre_tokenizer={"type": "ByteLevel", "use_regex": False}), "words that are whole texts"),
    "removed words": (
        changed(pre_tokenizer=split_by(PATTERNS["cl100k"].expression, behavior="Removed")),
        "asks for the behavior `Removed` of its pattern",
    ),
    "removed gaps of an unknown pattern": (
        changed(pre_tokenizer=split_by(r"\\p{L}+", behavior="Removed", invert=True)),
        "asks for the behavior `Removed` of its pattern",
    ),
    "merged words": (
        changed(pre_tokenizer=split_by("x", behavior="MergedWithNext")),
        "asks for the behavior `MergedWithNext` of its pattern",
    ),
    "two splits": (
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, SPLIT, BYTE_LEVEL]}),
        "asks for the pre-tokenizer `{",
    ),
    "a token without text": (changed(model__vocab={**BYTE_VOCAB, "": 300}), "has a token without text"),
    "an added token that is half a character": (
        changed(added_tokens=[{**ADDED, "content": "\ud800"}]),
        "has the added token",
    ),
    "an added token with a huge id": (changed(added_tokens=[{**ADDED, "id": 2**31}]), "beyond 16,777,215"),
    "other words": (changed(pre_tokenizer={"type": "Whitespace"}), "the pre-tokenizer `{"),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "the pre-tokenizer `null`"),
    "no vocabulary": (changed(model__vocab=None), "does not hold a vocabulary"),
    "an empty vocabulary": (changed(model__vocab={}), "has an empty vocabulary"),
    "a missing byte": (changed(model__vocab={"a": 0}, model__merges=[]), "lacks 255 of the 256 single bytes"),
    "an id that is text": (changed(model__vocab={**BYTE_VOCAB, "x y": "1"}), 'has the id `"1"`'),
    "an id that is true": (changed(model__vocab={**BYTE_VOCAB, "xy": True}), "has the id `true`"),
    "a negative id": (changed(model__vocab={**BYTE_VOCAB, "xy": -1}), "has the id `-1`"),
    "an id twice": (changed(model__vocab={**BYTE_VOCAB, "xy": 256}), "two tokens of .* have the id `256`"),
    "a huge id": (changed(model__vocab={**BYTE_VOCAB, "xy": 2**40}), "beyond 16,777,215"),
    "merges that are no list": (changed(model__merges="ab"), "does not hold a list of merges"),
    "a merge of three": (changed(model__merges=[["a", "b", "c"]]), "is not two tokens"),
    "a merge of numbers": (changed(model__merges=[[1, 2]]), "is not two tokens"),
    "a merge without token": (
        changed(model__merges=[["x", "y"]]),
        "merge 1 of .* has a token that the vocabulary lacks",
    ),
    "added tokens that are no list": (changed(added_tokens=3), "does not hold a list of added tokens"),
    "an added token without id": (changed(added_tokens=[{"content": "x"}]), "has the added token"),
    "an added token with a taken id": (changed(added_tokens=[{**ADDED, "id": 97}]), "have the id `97`"),
    "an added token that strips": (changed(added_tokens=[{**ADDED, "lstrip": True}]), "`lstrip` for the token `<|e|>`"),
    "an expression that cannot be": (changed(pre_tokenizer=split_by("(")), "the pattern `\\(` of .* cannot be used"),
    "an expression that takes for ever": (
        changed(pre_tokenizer=split_by("(?:a|aa)+$")),
        "the pattern .* takes too long",
    ),
    "an expression that is too deep": (changed(pre_tokenizer=split_by("(" * 5000)), "the pattern `.* cannot be used"),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_file_that_cannot_be_used_is_explained(tmp_path: Path, name: str) -> None:
    tree, message = BAD_TREES[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message.replace("|", "\\|").replace("{", "\\{")) as caught:
        Tokenizer.load(path)
    assert caught.value.hint
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: expecting value in line 1"),
        (b'{"a": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (b"[" * 100_000, "is not the JSON of a tokenizer"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not the JSON of a tokenizer"),
    ],
    ids=["empty", "cut off", "binary", "deep", "long number"],
)
def test_a_file_that_is_no_json_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / "merges.txt").write_text("")
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            Tokenizer.load(path)
        path.unlink()


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        ("#version: 0.2\na\n", "line 2 of .* is not two tokens: `a`"),
        ("a b c\n", "line 1 of .* is not two tokens"),
        ("a  b\n", "line 1 of .* is not two tokens"),
        ("x y\n", "merge 1 of .* has a token that the vocabulary lacks"),
    ],
)
def test_merges_that_cannot_be_used_are_explained(tmp_path: Path, merges: str, message: str) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(BYTE_VOCAB))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_merges_with_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(BYTE_VOCAB))
    (tmp_path / "merges.txt").write_bytes(b"#version: 0.2\r\na b\r\n")
    assert Tokenizer.load(tmp_path).encode("ab") == [256]


def test_a_tokenizer_that_is_not_there_is_explained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer `.*absent`"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(DataError, match="no tokenizer in `"):
        Tokenizer.load(tmp_path)
    for name in ("one", "two"):
        for path in tokenizer.save_gpt2(tmp_path):
            path.rename(path.with_name(f"{name}_{path.name}"))
    with pytest.raises(DataError, match="2 tokenizers in `"):
        Tokenizer.load(tmp_path)
    (tmp_path / "one_merges.txt").unlink()
    with pytest.raises(DataError, match=r"no file `.*one_merges\.txt`"):
        Tokenizer.load(tmp_path / "one_vocab.json")


def test_a_folder_that_cannot_be_written_is_explained(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="cannot write in `"):
        tokenizer.save(tmp_path / "taken")
