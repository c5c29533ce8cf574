"""Damage and malice: from a valid file and a seeded generator to one that is nearly valid.

Bytes are damaged as disks, networks and editors do it. Files with a grammar are also changed within it, where a reader
looks at values and no longer at syntax: that is where a stranger would aim.
"""

import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]


def _span(data: bytes, random: Random, most: int = 64) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.randint(1, most))


def flip_bit(data: bytes, random: Random) -> bytes:
    if not data:
        return b"\x01"
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def change_bytes(data: bytes, random: Random) -> bytes:
    start, stop = _span(data, random, 16)
    return data[:start] + random.randbytes(stop - start) + data[stop:]


def truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def extend(data: bytes, random: Random) -> bytes:
    tail = random.choice((random.randbytes(random.randint(1, 64)), bytes(64), data[-64:], b"\n", b" ", b"}", b"\xff"))
    return data + tail


def swap_blocks(data: bytes, random: Random) -> bytes:
    size = random.randint(1, 1 + len(data) // 3)
    first = random.randrange(1 + max(0, len(data) - 2 * size))
    second = random.randrange(first + size, 1 + max(first + size, len(data) - size))
    one, other = data[first : first + size], data[second : second + size]
    return data[:first] + other + data[first + size : second] + one + data[second + size :]


def duplicate_span(data: bytes, random: Random) -> bytes:
    start, stop = _span(data, random)
    return data[:stop] + data[start:stop] * random.randint(1, 3) + data[stop:]


def delete_span(data: bytes, random: Random) -> bytes:
    start, stop = _span(data, random)
    return data[:start] + data[stop:]


def zero_span(data: bytes, random: Random) -> bytes:
    """What a machine without power leaves of a block that was never written."""
    start, stop = _span(data, random, 4096)
    return data[:start] + bytes(stop - start) + data[stop:]


BYTES: tuple[Mutation, ...] = (
    flip_bit, change_bytes, truncate, extend, swap_blocks, duplicate_span, delete_span, zero_span,
)  # fmt: skip

RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 30, "9" * 5000, "1e-400", "-1", "0", "1.5", "2e0",
    "99999999999", "4294967296", "true", "null", "[]", "{}", '""', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"',
    '"/etc/passwd"', '"<script>alert(1)</script>"', '"\\u001b]52;c;AAAA\\u0007"', '"\\u202e"', '"x|y\\nz"', '"*"',
    '"(a+)+$"', '{"__class__": "os.system", "args": ["false"]}', "[" * 200 + "]" * 200, "[" * 3000 + "]" * 3000,
    '{"a":' * 500 + "1" + "}" * 500, "[" * 200_000, '"' + "x" * 100_000 + '"', "[0, 18446744073709551616]",
)  # fmt: skip
"""Values, spelled as JSON or nearly, that a reader may not expect where it meets them."""

_MARK = "\x00mark {}\x00"


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in a tree."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        found.append((tree, key))
        _places(tree[key], found)
    return found


def _two_places(whole: list[Any], random: Random) -> tuple[Any, Any, Any]:
    """Return a container with a key in it, and another container."""
    places = _places(whole, [])
    # Files have a few settings and many tokens or weights: without this nearly all changes would hit the latter.
    shallow = [place for place in places if len(place[0]) <= 32]
    return *random.choice(shallow if random.random() < 0.7 else places), random.choice(places)[0]


def _second_key(container: dict[str, Any], key: str, random: Random) -> tuple[str, str]:
    """Return how a key with its value is spelled, and how it would be with another value of that name before it."""
    spelled = f"{json.dumps(key)}: {json.dumps(container[key])}"
    return spelled, f"{json.dumps(key)}: {random.choice(RAW)}, {spelled}"


def change_json(data: bytes, random: Random) -> bytes:
    """Change one to three values of a JSON text: by another type, an extreme, a hostile text, a copy, a second key."""
    try:
        whole = [json.loads(data)]
    except ValueError:
        return flip_bit(data, random)
    raw: dict[str, str] = {}

    def marked(text: str) -> str:
        mark = _MARK.format(len(raw))
        raw[json.dumps(mark)] = text
        return mark

    for _ in range(random.choice((1, 1, 1, 2, 3))):
        container, key, another = _two_places(whole, random)
        value, kind = container[key], random.random()
        if kind < 0.6:
            container[key] = marked(random.choice(RAW))
        elif kind < 0.8:
            numbers = (value + 1, -value, float(value)) if isinstance(value, int | float) else ()
            container[key] = json.loads(json.dumps(random.choice((*numbers, [value], another))))  # no part twice
        elif isinstance(container, list):
            container.insert(random.randrange(len(container) + 1), value)
        elif kind < 0.9:
            del container[key]
        else:
            raw.update([_second_key(container, key, random)])
    while len(whole) > 1:
        whole = [whole]
    text = json.dumps(whole[0])
    for mark, spelled in raw.items():
        text = text.replace(mark, spelled, 1)
    return text.encode()


def change_json_line(data: bytes, random: Random) -> bytes:
    """Change one line of JSON, or the order and number of lines."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    kind = random.random()
    if kind < 0.7:
        lines[place] = change_json(lines[place], random)
    elif kind < 0.8:
        random.shuffle(lines)
    elif kind < 0.9:
        lines.insert(random.randrange(len(lines)), lines[place])
    else:
        del lines[place]
    return b"\n".join(lines)


def change_safetensors_header(data: bytes, random: Random) -> bytes:
    """Change what a safetensors header says of places, shapes and types, or the length it claims for itself."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    kind = random.random()
    if kind < 0.1 or not names:
        claimed = random.choice((0, 1, size - 1, size + 1, len(data), 2**31, 2**63, 2**64 - 1))
        return claimed.to_bytes(8, "little") + data[8:]
    entry, other = header[random.choice(names)], header[random.choice(names)]
    if kind < 0.25:
        entry["data_offsets"] = random.choice(
            (
                other["data_offsets"],
                entry["data_offsets"][::-1],
                [0, 2**62],
                [0, len(body) + 1],
                [-4, 0],
                [0],
                [0.0, 4.0],
            )
        )
    elif kind < 0.45:
        shapes = (
            other["shape"],
            [],
            [0],
            [2**62],
            [2**31, 2**31, 2**31],
            [-1],
            entry["shape"][::-1],
            [1, *entry["shape"]],
        )
        entry["shape"] = random.choice((*shapes, [*entry["shape"], 1], [1.5], "4"))
    elif kind < 0.55:
        entry["dtype"] = random.choice(("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "Q8", 4, ""))
    elif kind < 0.65:
        header[random.choice(names)] = dict(entry)  # two names for one place
    elif kind < 0.75:
        header[random.choice(("../x", "", "x" * 5000, "\x1b[2J"))] = header.pop(random.choice(names))
    elif kind < 0.8:
        header["__metadata__"] = random.choice(({"lfs": "{"}, {"lfs": 1}, [], "x", {"format": "pt"}))
    elif kind < 0.85 and "__metadata__" in header and "lfs" in header["__metadata__"]:
        inner = header["__metadata__"]["lfs"].encode()
        header["__metadata__"]["lfs"] = change_json(inner, random).decode()
    else:
        text = change_json(json.dumps(header).encode(), random)
        return len(text).to_bytes(8, "little") + text + body
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def change_text_line(data: bytes, random: Random) -> bytes:
    """Change one line of a text whose lines mean something: its words, its place, its length."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    words = lines[place].split(b" ")
    word = random.randrange(len(words))
    kind = random.random()
    if kind < 0.5:
        words[word] = random.choice(
            (b"", b"-1", b"9" * 30, b"1e5", b"0", b"|", b"\\|", b"=", b"===", b"x" * 100_000, b"\xff", b"\x1b[2J",
             "\u2028".encode(), b"\r", b"IQ==", b"..", b"../..", b"/", b"NaN", b"[" * 3000, b'{"a": 1}')
        )  # fmt: skip
        lines[place] = b" ".join(words)
    elif kind < 0.7:
        lines.insert(random.randrange(len(lines)), lines[place])
    elif kind < 0.85:
        random.shuffle(lines)
    else:
        lines[place] = lines[place] + lines[random.randrange(len(lines))]
    return b"\n".join(lines)


GRAMMARS: dict[str, Mutation] = {
    "json": change_json,
    "json lines": change_json_line,
    "safetensors": change_safetensors_header,
    "text": change_text_line,
}
"""What can be changed within a file, by the kind of the file; other kinds have nothing but bytes."""


def mutated(data: bytes, kind: str, random: Random) -> bytes:
    """Return ``data`` with one change, sometimes a second one on top."""
    grammar = GRAMMARS.get(kind)
    for _ in range(random.choice((1, 1, 1, 2))):
        try:
            change = grammar if grammar is not None and random.random() < 0.6 else random.choice(BYTES)
            data = change(data, random)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            data = flip_bit(data, random)  # the first change has left nothing that the grammar fits
    return data
