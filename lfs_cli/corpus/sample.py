"""The built-in corpus: short stories for children, written by a grammar, for when there is no network.

In the spirit of TinyStories: the words of a three-year-old, and everything that a small model must learn to tell a
story. Pronouns agree with their character, what is introduced comes back, who loses a thing finds it, and the weather
holds. The stories are never the same twice, so that reciting does not help.

`sample_words.py` has the words and `sample_plots.py` the plots, as sentences in this notation:

    {A.he}             a field of this story, as in `str.format`: hero A, friend B, grown-up G, `place`, `day`, ...
    [big|very big]     one of these, chosen anew at each use; may be nested and may be empty
    #color             one of the entries of `WORDS["color"]`
    <A asks: Why?>     A says so: the manner is a key of `SPEECH`. The speaker is a field, `a` for A's name or
                       pronoun, or words such as `the duck`. It stands before, behind or within what is said.

A plot is a row of beats, and a beat a few ways to say the same; an empty way may leave the beat out.

Source: Eldan & Li, "TinyStories: How small can language models be and still speak coherent English?", 2023
(arXiv:2305.07759), for what such stories are like. No text was taken over.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from lfs_cli.corpus import sample_words as words
from lfs_cli.corpus.sample_plots import PLOTS, Plot
from lfs_cli.errors import DataError, remedy
from lfs_cli.files import replacing

T = TypeVar("T")
Fields = dict[str, Any]
Pattern = tuple["str | tuple[str | Pattern, ...]", ...]
"""A sentence in parts: a string stays as it is, and of a tuple one member is chosen."""

SAMPLE_LICENCE = "MIT"
SEPARATOR = "\n<|endoftext|>\n"
VALID_SHARE = 0.05
PARAGRAPH_SHARE = 0.25  # of beats, those that begin a paragraph
BACKGROUND_SHARE = 0.6  # of stories, those that tell who it is about before anything happens


def write_sample(
    train_path: Path,
    valid_path: Path,
    size_bytes: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write stories for training and, from other random numbers, a twentieth as many for validation.

    Both files appear under their names when both are complete.

    Args:
        train_path: Gets stories up to ``size_bytes``, the last one in full.
        valid_path: Gets 5 % of that.
        size_bytes: Size of the training text in bytes.
        seed: Same seed, same files, on any machine and version of Python.
        on_progress: Called now and then with the bytes written so far and the bytes in total.

    Raises:
        DataError: When the files cannot be written.
    """
    parts = [(train_path, size_bytes, 2 * seed), (valid_path, int(size_bytes * VALID_SHARE), 2 * seed + 1)]
    total = sum(size for _, size, _ in parts)
    finished = 0
    try:
        with ExitStack() as stack:
            drafts = [stack.enter_context(replacing(path)) for path, _, _ in parts]
            for draft, (_, size, stream) in zip(drafts, parts, strict=True):
                for done in _write(draft, size, stream):
                    if on_progress:
                        on_progress(min(finished + done, total), total)
                finished += size
    except OSError as error:
        raise DataError(
            f"cannot write the sample corpus to `{train_path.parent}`: {error.strerror}",
            hint=remedy(error) or "set `LFS_DATA` to another folder",
        ) from error


def stories(seed: int) -> Iterator[str]:
    """Yield stories without end, the same ones for the same seed. Each is a few short paragraphs of ASCII."""
    random = Random(seed).random  # of the standard generator, only this is promised to never change
    while True:
        yield _tell(random)


def _write(path: Path, size: int, seed: int) -> Iterator[int]:
    """Write stories to ``path`` until it has ``size`` bytes, yielding the bytes so far every 64 stories or so."""
    with path.open("wb") as file:
        done = 0
        for number, story in enumerate(stories(seed), start=1):
            done += file.write(f"{story}{SEPARATOR}".encode("ascii"))
            if number % 64 == 0:
                yield done
            if done >= size:
                break
    yield done


class Character(str):
    """A name that knows its pronouns: `{A}`, `{A.he}`, `{A.him}`, `{A.his}`, `{A.self}`, `{A.intro}`, ..."""

    def __new__(cls, name: str, pronoun: str, **traits: str) -> "Character":
        self = super().__new__(cls, name)
        self.he, self.him, self.his, self.self = words.PRONOUNS[pronoun]
        self.He, self.His = self.he.capitalize(), self.his.capitalize()
        self.__dict__.update(traits)
        return self

    he: str
    him: str
    his: str
    self: str
    He: str
    His: str
    kind: str
    tie: str


class Thing(str):
    """What a plot is about, with the words that agree: `{thing}`, `{thing.own}`, `{thing.it}`, `{thing.was}`, ...

    Args:
        text: With its article, such as ``"a red ball"`` or ``"some blue boots"``, which are many; other words serve as
            well. Without the article it is `{thing.own}`, as in `his red ball`. Its last word alone is what it is
            called later, `{thing.short}`, or what stands after a slash: ``"a red toy car/car"``.
    """

    def __new__(cls, text: str) -> "Thing":
        text, _, short = text.partition("/")
        self = super().__new__(cls, text)
        article, _, rest = text.partition(" ")
        self.own = rest if article in ("a", "an", "some") else text
        self.the, self.The = f"the {self.own}", f"The {self.own}"
        self.short = short or text.rpartition(" ")[2]
        self.cap = text[:1].upper() + text[1:]
        self.__dict__.update(_PLURAL if article == "some" else _SINGULAR)
        return self

    own: str
    the: str
    The: str
    short: str
    cap: str
    it: str
    they: str
    They: str
    was: str


_SINGULAR = {"it": "it", "they": "it", "They": "It", "was": "was", "is": "is"}
_PLURAL = {"it": "them", "they": "they", "They": "They", "was": "were", "is": "are"}


class Place(str):
    """Where a story happens: `{place}`, `{place.at}`, `{place.to}`, `{place.spot}`, `{place.view}`, ..."""

    def __new__(cls, name: str, random: Callable[[], float]) -> "Place":
        self = super().__new__(cls, name)
        preposition, self.ground, spots, views = words.PLACES[name]
        self.at = f"{preposition} {name}"
        self.to = f"to {name}"
        self.spot, self.spot2, self.spot3 = _sample(random, spots, 3)
        self.view = _choose(random, views)
        return self

    at: str
    to: str
    ground: str
    spot: str
    spot2: str
    spot3: str
    view: str


class Day(str):
    """What a day is like, and `{day.sky}`, a sentence about it."""

    sky: str


def _tell(random: Callable[[], float]) -> str:
    """Return one story: choose a plot, its cast and its things, and one way to say each beat."""
    plot = _choose(random, PLOTS)
    fields = _cast(random, plot)
    for names, options in plot.choices.items():
        _bind(random, fields, names, _choose(random, options))
    fields.setdefault("When", _say(random, fields, "#when"))

    beats = [*(_choose(random, ways) for ways in plot.beats), "#the_end"]
    if random() < BACKGROUND_SHARE:  # first who it is about, then what happened
        beats.insert(0, "#opening")
        fields["who"] = _choose(random, (str(fields["A"]), fields["A"].he))
    else:
        fields["who"] = fields["A"].intro

    said: list[str] = []
    for beat in beats:
        sentences: list[str] = []
        _expand(random, _parse(beat), sentences)
        if any(sentences):  # else the beat is left out this time
            if said:
                said.append("\n\n" if random() < PARAGRAPH_SHARE else " ")
            said += sentences
    return _fill("".join(said), fields)


def _cast(random: Callable[[], float], plot: Plot) -> Fields:
    """Return the characters, the place and the day of a story."""
    a_child = plot.hero == "child" or (plot.hero == "any" and random() < 0.7)
    b_child = a_child if random() < 0.75 else not a_child
    hero = _child(random) if a_child else _animal(random, plot.kinds)
    friend = hero
    while friend == hero or friend.kind == hero.kind not in ("girl", "boy"):
        friend = _child(random) if b_child else _animal(random)
    friend.tie = "friend"
    if a_child and b_child:
        sibling = "cousin" if plot.apart else "brother" if friend.he == "he" else "sister"
        friend.tie = _choose(random, ("friend", "friend", "friend", "cousin", sibling))

    name, role, pronoun = _choose(random, words.GROWN_UPS)
    place = Place(_choose(random, plot.places or tuple(words.PLACES)), random)
    fields: Fields = {"A": hero, "B": friend, "G": Character(name, pronoun, kind=role, role=role), "place": place}
    day = Day(_choose(random, plot.days or tuple(words.WEATHER)))
    day.sky = _say(random, fields, _choose(random, words.WEATHER[day])) if day in words.WEATHER else ""
    return fields | {"day": day}


def _child(random: Callable[[], float]) -> Character:
    pronoun, kind, names = ("she", "girl", words.GIRLS) if random() < 0.5 else ("he", "boy", words.BOYS)
    name = _choose(random, names)
    look = f"a {_choose(random, words.CHILD_LOOKS)} {kind}"
    called = "called" if random() < 0.2 else "named"
    return Character(name, pronoun, kind=kind, full=name, a=look, intro=f"{look} {called} {name}")


def _animal(random: Callable[[], float], kinds: Sequence[str] = ()) -> Character:
    pronoun, names = ("she", words.ANIMAL_GIRLS) if random() < 0.5 else ("he", words.ANIMAL_BOYS)
    kind = _choose(random, kinds or tuple(words.ANIMAL_KINDS))
    name = _choose(random, names)
    look = f"a {_choose(random, words.ANIMAL_KINDS[kind])} {kind}"
    return Character(name, pronoun, kind=kind, full=f"{name} the {kind}", a=look, intro=f"{look} named {name}")


def _bind(random: Callable[[], float], fields: Fields, names: str, option: str | tuple[str, ...]) -> None:
    """Set the field ``names`` to ``option``, or several at once, such as ``"fear, deed"`` to a pair that fits."""
    values = (option,) if isinstance(option, str) else option
    for name, value in zip(names.split(", "), values, strict=True):
        fields[name] = Thing(_say(random, fields, value))


def _say(random: Callable[[], float], fields: Fields, sentence: str) -> str:
    """Return ``sentence`` with its choices made and its fields filled in."""
    said: list[str] = []
    _expand(random, _parse(sentence), said)
    return _fill("".join(said), fields)


_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


def _fill(sentences: str, fields: Fields) -> str:
    """Return ``sentences`` with the fields filled in, and with `an` where the next word asks for it."""
    return _ARTICLE.sub(r"\1n ", sentences.format_map(fields))


def _expand(random: Callable[[], float], pattern: Pattern, said: list[str]) -> None:
    for part in pattern:
        chosen = part if isinstance(part, str) else part[int(random() * len(part))]
        if isinstance(chosen, str):
            said.append(chosen)
        else:
            _expand(random, chosen, said)


_TOKEN = re.compile(r"#(\w+)|<([^:<>]*) (\w+): ([^<>]*)>|([\[|\]])")


def _any_of(phrases: Iterable[str]) -> str:
    return "|".join(re.escape(phrase) for phrase in phrases)


# What a choice begins with is left as it is: a sentence that went through this before holds `[do not|don't]`.
_PARAPHRASED = re.compile(
    rf"(?<![\w\[|])(?:(?:{_any_of(words.CONTRACTIONS)})(?= (?!not )[a-z{{])|(?:{_any_of(words.PARAPHRASES)})\b)",
    re.IGNORECASE,
)


def _paraphrase(match: re.Match[str]) -> str:
    """Return a choice between what a sentence says and the other ways to say it."""
    said = match[0]
    key = said if said in words.CONTRACTIONS else f"{said[0].lower()}{said[1:]}"
    others = words.PARAPHRASES.get(key) or (words.CONTRACTIONS[key],)
    if said[0].isupper():
        others = tuple(f"{other[0].upper()}{other[1:]}" for other in others)
    return f"[{'|'.join((said, *others))}]"


@cache
def _parse(sentence: str) -> Pattern:
    """Return ``sentence`` in parts. See the module docstring for the notation."""
    sentence = _PARAPHRASED.sub(_paraphrase, sentence)
    stack: list[list[list[Any]]] = [[[]]]
    end = 0
    for token in _TOKEN.finditer(sentence):
        stack[-1][-1].append(sentence[end : token.start()])
        end = token.end()
        word, speaker, manner, line, bracket = token.groups()
        if word:
            stack[-1][-1].append(tuple(_plain(_parse(entry)) for entry in words.WORDS[word]))
        elif speaker:
            stack[-1][-1].append(tuple(_plain(_parse(form)) for form in _speak(speaker, manner, line)))
        elif bracket == "[":
            stack.append([[]])
        elif bracket == "|":
            stack[-1].append([])
        else:
            options = stack.pop()
            stack[-1][-1].append(tuple(_plain(option) for option in options))
    (parts,), *unclosed = stack
    if unclosed:
        raise ValueError(f"`[` without `]` in {sentence!r}")
    return tuple(part for part in [*parts, sentence[end:]] if part)


def _plain(parts: Sequence[Any]) -> Any:
    """Return a pattern that is one string or nothing as a string, which needs no further choice."""
    parts = [part for part in parts if part]
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    return tuple(parts)


def _speak(speaker: str, manner: str, line: str) -> Iterator[str]:
    """Yield the ways in which ``speaker`` says ``line``.

    >>> list(_speak("A", "whispers", "Hush! Be quiet."))[:3]
    ['{A} whispered, "Hush! Be quiet."', '"Hush!" {A} whispered. "Be quiet."', '"Hush!" whispered {A}. "Be quiet."']
    """
    first, rest = _split_sentence(line)
    if rest:
        rest = f' "{rest}"'
    if first.endswith("."):
        first = f"{first[:-1]},"
    for verb, tail in words.SPEECH[manner]:
        if verb in words.LOUD and not first.endswith("!"):
            continue
        for middle, start in _SPEAKERS.get(speaker, ((speaker, speaker.replace("the", "The", 1)),)):
            yield f'{start} {verb}{tail}, "{line}"'
            yield f'"{first}" {middle} {verb}{tail}.{rest}'
            if " " not in verb and not middle.endswith(".he}"):  # nobody writes: said she
                yield f'"{first}" {verb} {middle}{tail}.{rest}'


_SPEAKERS = {
    # how a speaker is called: within a sentence, at its start
    "A": (("{A}", "{A}"),),
    "a": (("{A}", "{A}"), ("{A.he}", "{A.He}")),
    "B": (("{B}", "{B}"),),
    "b": (("{B}", "{B}"), ("{B.he}", "{B.He}")),
    "G": (("{G}", "{G}"), ("{A.his} {G.role}", "{A.His} {G.role}")),
}


def _split_sentence(line: str) -> tuple[str, str]:
    """Return the first sentence of ``line`` and the rest; a choice in brackets is not split."""
    depth = 0
    for place, character in enumerate(line):
        depth += (character == "[") - (character == "]")
        if not depth and character in ".!?" and line[place + 1 : place + 2] == " ":
            return line[: place + 1], line[place + 2 :]
    return line, ""


def _choose(random: Callable[[], float], options: Sequence[T]) -> T:
    return options[int(random() * len(options))]


def _sample(random: Callable[[], float], options: Sequence[T], count: int) -> list[T]:
    """Return ``count`` different ones of ``options``."""
    left = list(options)
    return [left.pop(int(random() * len(left))) for _ in range(count)]
