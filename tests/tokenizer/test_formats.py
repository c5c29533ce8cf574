import json
from pathlib import Path

import pytest
from awkward_texts import for_all, texts

from lfs_cli.errors import DataError
from lfs_cli.tokenizer import PATTERNS, Tokenizer, learn_bpe
from lfs_cli.tokenizer.formats import byte_to_character, read_token, write_token

CORPUS = "the cat sat on the mat, the cat ate 100 cakes at the café 中文中文 <|endoftext|>" * 3
BYTES = {id: bytes([id]) for id in range(256)}


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


def test_a_merge_may_be_one_text_as_older_versions_write_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path)
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["model"]["merges"] = [" ".join(merge) for merge in tree["model"]["merges"]]
    path.write_text(json.dumps(tree))
    assert Tokenizer.load(path).hash == tokenizer.hash


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
    "other words": (changed(pre_tokenizer={"type": "Whitespace"}), "the pre-tokenizer `{"),
    "no pre-tokenizer": (changed(pre_tokenizer=None), "the pre-tokenizer `null`"),
    "no vocabulary": (changed(model__vocab=None), "does not hold a vocabulary"),
    "an empty vocabulary": (changed(model__vocab={}), "has an empty vocabulary"),
    "a missing byte": (changed(model__vocab={"a": 0}, model__merges=[]), "lacks 255 of the 256 single bytes"),
    "an id that is text": (changed(model__vocab={**BYTE_VOCAB, "x y": "1"}), 'has the id `"1"`'),
    "an id that is true": (changed(model__vocab={**BYTE_VOCAB, "xy": True}), "has the id `true`"),
    "a negative id": (changed(model__vocab={**BYTE_VOCAB, "xy": -1}), "has the id `-1`"),
    "an id twice": (changed(model__vocab={**BYTE_VOCAB, "xy": 256}), "two tokens of .* have the id `256`"),
    "a huge id": (changed(model__vocab={**BYTE_VOCAB, "xy": 2**40}), "beyond 2\\^31"),
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
    "an expression that cannot be": (
        changed(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
                    {"type": "ByteLevel", "use_regex": False},
                ],
            }
        ),
        "the pattern `\\(` cannot be used",
    ),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_file_that_cannot_be_used_is_explained(tmp_path: Path, name: str) -> None:
    tree, message = BAD_TREES[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message.replace("|", "\\|").replace("{", "\\{")) as caught:
        Tokenizer.load(path)
    assert caught.value.hint
    assert str(path) in str(caught.value) or "pattern" in str(caught.value)


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
