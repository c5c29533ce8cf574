import errno
import gzip
import hashlib
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from lfs_cli.corpus import sample, sample_words
from lfs_cli.corpus.sample import PLOTS, SEPARATOR, Thing, stories, write_sample
from lfs_cli.errors import DataError

OTHER_PRONOUNS = {"she": r"\b(he|him|his|himself)\b", "he": r"\b(she|her|hers|herself)\b"}


@pytest.fixture(scope="module")
def many() -> list[str]:
    return list(islice(stories(11), 8_000))


def tell(plot: sample.Plot, seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sample, "PLOTS", (plot,))
    return next(stories(seed))


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+|[.,!?:\"]", text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_stories_of_a_seed_never_change(golden) -> None:
    text = SEPARATOR.join(islice(stories(0), 200))
    told = SEPARATOR.join([*islice(stories(0), 4), f"sha256 of 100 kB: {digest(text[:100_000])}\n"])
    assert len(text) > 100_000
    golden("sample_stories.txt", told)


def test_other_seeds_tell_other_stories() -> None:
    first = {story for seed in range(20) for story in islice(stories(seed), 20)}
    assert len(first) == 400


def test_no_two_stories_are_the_same() -> None:
    assert len(set(islice(stories(5), 20_000))) == 20_000


FAULTS = {
    "notation that is left": r"[{}\[\]<>|#/_]",
    "two spaces": r"  ",
    "a space before a line break": r" \n|\n ",
    "a space at an end": r"^\s|\s$",
    "a space before a stop": r" [.,!?:]",
    "two stops": r"[.,!?]{2}",
    "a before a vowel": r"\b[Aa] [aeiouAEIOU]",
    "an before a consonant": r"\b[Aa]n [^aeiou]",
    "a sentence in lower case": r"(^|\n|[a-z][.!?] |[.!?]\" |\. \")[a-z](?!\w* (said|asked)\b)(?<![.!?,]\" [a-z])",
    "a word twice": r"\b(?!(?:that|had|her)\b)(\w+) \1\b",
    "letters beyond ASCII": r"[^\x00-\x7f]",
    "an empty quote": r'""|" "\s',
    "a comma after a question": r"[?!],",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_text_is_free_of(fault: str, many: list[str]) -> None:
    found = [story[max(0, m.start() - 30) : m.end() + 30] for story in many for m in re.finditer(FAULTS[fault], story)]
    assert not found, found[:5]


def test_quotation_marks_come_in_pairs_within_a_paragraph(many: list[str]) -> None:
    assert all(paragraph.count('"') % 2 == 0 for story in many for paragraph in story.split("\n\n"))


def test_every_story_ends_with_a_full_sentence(many: list[str]) -> None:
    assert all(re.search(r'[.!?]"?$', story) for story in many)


@pytest.mark.parametrize("pronoun", ["she", "he"])
def test_pronouns_agree_with_the_characters(pronoun: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everybody have one pronoun: then the other one appears nowhere."""
    monkeypatch.setattr(sample, "_child", of_pronoun(sample._child, pronoun))
    monkeypatch.setattr(sample, "_animal", of_pronoun(sample._animal, pronoun))
    grown_ups = tuple(grown_up for grown_up in sample_words.GROWN_UPS if grown_up[2] == pronoun)
    monkeypatch.setattr(sample_words, "GROWN_UPS", grown_ups)
    neutral = [plot for plot in PLOTS if plot.name not in ("one wish", "a day in the snow")]  # a fairy, a snowman
    for seed, plot in enumerate(neutral * 40):
        story = tell(plot, seed, monkeypatch)
        assert not re.search(OTHER_PRONOUNS[pronoun], story, re.IGNORECASE), story


def of_pronoun(make, pronoun: str):
    def made(*arguments):
        while (character := make(*arguments)).he != pronoun:
            pass
        return character

    return made


def test_hero_and_friend_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3_000):
        fields = sample._cast(Random(seed).random, PLOTS[seed % len(PLOTS)])
        assert fields["A"] != fields["B"]
        assert fields["A"].kind in ("girl", "boy") or fields["A"].kind != fields["B"].kind


def test_who_loses_the_thing_gets_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (lost,) = (plot for plot in PLOTS if plot.name == "a lost thing is found")
    lost = replace(lost, choices=lost.choices | {"thing": ("some purple boots",)})
    for seed in range(200):
        story = tell(lost, seed, monkeypatch)
        lost_at = re.search(r"boots were gone|(not|n't) find (his|her) boots|Where were|to get late", story)
        found_at = re.search(r"[Tt]here they (are|were)|there were the|found (your|the purple) boots", story)
        assert lost_at, story
        assert found_at, story
        assert lost_at.start() < found_at.start(), story
        assert "purple boots" in story[: lost_at.start()], story


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_every_way_to_tell_a_plot_works(plot: sample.Plot) -> None:
    """A misspelled field, word or manner of speaking would raise an error here."""
    random = Random(1).random
    for _ in range(30):
        fields = sample._cast(random, plot) | {"When": "One day", "who": "Lily"}
        for names, options in plot.choices.items():
            for option in options:
                sample._bind(random, fields, names, option)
        for beat in plot.beats:
            for way in beat:
                assert "{" not in sample._say(random, fields, way)


@pytest.mark.parametrize("word", sample_words.WORDS)
def test_every_word_can_be_said(word: str) -> None:
    random = Random(2).random
    fields = sample._cast(random, PLOTS[0])
    for entry in sample_words.WORDS[word]:
        for _ in range(10):
            sample._say(random, fields, entry)


def test_things_agree_in_number() -> None:
    ball, boots = Thing("a red toy ball/ball"), Thing("some blue boots")
    assert (ball, ball.own, ball.short, ball.the, ball.it, ball.was) == (
        "a red toy ball", "red toy ball", "ball", "the red toy ball", "it", "was",
    )  # fmt: skip
    assert (boots, boots.own, boots.short, boots.it, boots.They, boots.was) == (
        "some blue boots", "blue boots", "boots", "them", "They", "were",
    )  # fmt: skip


def test_what_is_said_is_said_in_many_ways() -> None:
    assert list(sample._speak("A", "asks", "Why? Tell me.")) == [
        '{A} asked, "Why? Tell me."',
        '"Why?" {A} asked. "Tell me."',
        '"Why?" asked {A}. "Tell me."',
    ]
    assert '"I know," {A.he} said.' in sample._speak("a", "says", "I know.")
    assert '"I know," said {A.he}.' not in sample._speak("a", "says", "I know.")


def test_a_sentence_with_an_open_bracket_is_refused() -> None:
    with pytest.raises(ValueError, match="without"):
        sample._parse("A [big dog.")


def test_the_stories_are_varied(many: list[str]) -> None:
    text = "\n".join(many[:4_000])
    words = words_of(text)
    fives = Counter(zip(*(words[start:] for start in range(5)), strict=False))
    sentences = re.split(r'(?<=[.!?"])\s+', text)

    assert len(PLOTS) >= 20
    assert 1_000 < len({word.lower() for word in words}) < 2_000  # what a child of four knows
    assert len(fives) / len(words) > 0.3
    assert len(set(sentences)) > 38_000
    assert len(gzip.compress(text.encode())) / len(text) > 0.25


def test_other_stories_are_not_pieces_of_the_known_ones(many: list[str]) -> None:
    """Twenty words in a row of a new story are rarely in 3 MB of others: reciting does not help."""

    def runs(told: list[str], length: int) -> list[tuple[str, ...]]:
        words = [words_of(story) for story in told]
        return [tuple(story[start : start + length]) for story in words for start in range(len(story) - length)]

    known = {hash(run) for run in runs(many[:4_000], 20)}
    new = runs(list(islice(stories(12), 300)), 20)
    assert sum(hash(run) in known for run in new) / len(new) < 0.1


def test_a_third_to_two_thirds_begin_as_stories_do(many: list[str]) -> None:
    begins = sum(bool(re.match(r"Once upon a time|One|There (was|once)", story)) for story in many)
    assert 0.33 < begins / len(many) < 0.6


@pytest.mark.parametrize("size", [1, 5_000, 300_000])
def test_the_files_have_the_size_that_was_asked_for(tmp_path: Path, size: int) -> None:
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    write_sample(train, valid, size, seed=3)
    longest = max(len(story) for story in islice(stories(0), 2_000)) + 500
    assert size <= train.stat().st_size < size + longest
    assert size // 20 <= valid.stat().st_size < size // 20 + longest


def test_stories_are_separated_as_in_tinystories(tmp_path: Path) -> None:
    train, valid = tmp_path / "train.txt", tmp_path / "valid.txt"
    write_sample(train, valid, 20_000, seed=0)
    text = train.read_text(encoding="ascii")
    assert text.endswith(SEPARATOR)
    assert SEPARATOR == "\n<|endoftext|>\n"
    told = text.split(SEPARATOR)[:-1]
    assert told == list(islice(stories(0), len(told)))


def test_training_and_validation_share_no_story(tmp_path: Path) -> None:
    seen: set[str] = set()
    total = 0
    for seed in range(4):
        write_sample(tmp_path / "train.txt", tmp_path / "valid.txt", 400_000, seed=seed)
        for name in ("train.txt", "valid.txt"):
            told = (tmp_path / name).read_text(encoding="ascii").split(SEPARATOR)[:-1]
            seen.update(told)
            total += len(told)
    assert len(seen) == total


def test_progress_is_told_up_to_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_sample(
        tmp_path / "train.txt", tmp_path / "valid.txt", 200_000, on_progress=lambda *numbers: told.append(numbers)
    )
    assert told == sorted(told)
    assert told[-1] == (210_000, 210_000)
    assert len(told) > 4


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "train.txt").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_sample(tmp_path / "train.txt", tmp_path / "valid.txt", 10**6, on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]
    assert (tmp_path / "train.txt").read_text() == "before"


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        write_sample(tmp_path / "train.txt", tmp_path / "valid.txt", 1_000)
    assert caught.value.hint.startswith("free some space")
    assert list(tmp_path.iterdir()) == []
