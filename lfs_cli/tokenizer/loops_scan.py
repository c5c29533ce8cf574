"""Where words start, as compiled loops: the patterns of `split.py` as state machines over UTF-8 bytes.

Text is read in blocks of 64 bytes. A few vector comparisons sort the bytes of a block into masks: words of 64 bits, one
bit for each byte. From the masks the starts of all words of the block follow by shifts, ands and ors:

    text        I t ' s   a       t e s t
    letters     1 1 . 1 . 1 . . . 1 1 1 1         L
    white       . . . . 1 . 1 1 1 . . . .         W, of which all here are plain spaces S
    other       . . 1 . . . . . . . . . .         O
    starts      1 . 1 . 1 . 1 . 1 . . . .         GPT-2: (L and not L before it and not S before it) or (O ...) or ...

A pattern looks one character ahead, so a block is sorted one step before its starts are found, and what it must know of
the block before (the last bit of each mask) goes from step to step. What is rare is done one by one: characters that
are not ASCII, whose bytes all get the class of the character, contractions, digits in groups, line ends between spaces.

A byte that is not part of valid UTF-8 is a character of its own, of the class OTHER.

Each scanner starts afresh at ``AT = 0`` with the SCAN_STATE all 0, finds the starts in the next STRETCH bytes, writes
them to STARTS as 32-bit offsets, and returns how many there are. The text is at VIEW and has SIZE bytes; what is
behind them, up to a block, must be readable, and 0 after a text that ends there.

They must equal `split.PATTERNS[...].split`. Importing this file imports numba.
"""

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer.unicode_classes import LETTER, LOWER, MARK, NUMBER, SPACE, UPPER
from lfs_cli.tokenizer.vectors import (
    ALL,
    ONE,
    count_bits,
    field,
    helper,
    lowest_bit,
    mask_field,
    number,
    pairs_64,
    put,
    read_32,
    read_byte,
    read_int,
    sort_64,
    sort_64_more,
    word,
    write_32,
    write_64,
    zeros_above,
)

NOTHING = word(0)

(
    READY, CARRY, CLEAR_NEXT, START_NEXT,
    LAST_LETTER, LAST_DIGIT, LAST_OTHER, LAST_WHITE, LAST_SPACE,
    LAST_END, LAST_TAKEN, LAST_LONE, LAST_LOWER, LAST_CASELESS, GROUP, HAS_LOWER,
    NEXT_LETTERS, NEXT_DIGITS, NEXT_WHITE, NEXT_SPACES, NEXT_APOSTROPHES, NEXT_FORCED, NEXT_WIDE_WHITE,
    NEXT_UPPER, NEXT_LOWER, NEXT_MARKS, NEXT_ENDS, NEXT_SLASHES, NEXT_INNER,
) = range(d.SCAN_STATE, d.SCAN_STATE + 29)  # fmt: skip
"""What a scanner knows between two stretches: flags of the last byte (LAST_), masks of the block that is sorted."""

WIDE = d.SCAN_STATE + 32
WIDE_FORCED, WIDE_INNER = WIDE + 8, WIDE + 9
"""Masks of the characters beyond ASCII of one block, by class; see `_sort_wide`."""


@helper
def _character(place: int) -> tuple[int, int]:
    """Return the code point of the character at an address, -1 for what is not UTF-8, and its number of bytes."""
    data = read_32(place)
    first = data & 0xFF
    if first < 0x80:
        return first, 1
    if data & 0xC0E0 == 0x80C0 and first >= 0xC2:
        return (first & 0x1F) << 6 | (data >> 8 & 0x3F), 2
    if data & 0xC0C0F0 == 0x8080E0:
        code = (first & 0x0F) << 12 | (data >> 8 & 0x3F) << 6 | (data >> 16 & 0x3F)
        if code >= 0x800 and code & 0xF800 != 0xD800:  # surrogates are not UTF-8
            return code, 3
    elif data & 0xC0C0C0F8 == 0x808080F0:
        code = (first & 0x07) << 18 | (data >> 8 & 0x3F) << 12 | (data >> 16 & 0x3F) << 6 | (data >> 24 & 0x3F)
        if 0x10000 <= code <= 0x10FFFF:
            return code, 4
    return -1, 1


@helper
def _class_at(place: int, classes: int) -> tuple[int, int]:
    """Return the class of the character at an address and its number of bytes."""
    code, size = _character(place)
    return (read_byte(classes + code) if code >= 0 else 0), size


@helper
def _sort_wide(block: int, left: int, classes: int, desk: int, wide: int) -> None:
    """Sort the bytes of a block that are not ASCII.

    All bytes of a character get its class, in the masks WIDE + class. Of a white space the first byte goes to
    WIDE_FORCED when it is the last of its run, with something behind it, and the bytes after the first of any
    character go to WIDE_INNER.

    Args:
        block: Address of 64 bytes.
        left: How many bytes of text there are from there on.
        classes: Address of the class of each code point.
        desk: Where the masks are; CARRY holds what the last character of the block before left for this one.
        wide: Which bytes are not ASCII.
    """
    for kind in range(10):
        put(desk, WIDE + kind, 0)
    carry = field(desk, CARRY)
    if carry != 0:
        taken = (ONE << word(carry & 0xFF)) - ONE
        put(desk, WIDE + (carry >> 8), taken)
        put(desk, WIDE_INNER, taken)
        wide &= ~taken
        put(desk, CARRY, 0)
    while wide != NOTHING:
        at = lowest_bit(wide)
        if at >= left:
            break
        kind, size = _class_at(block + at, classes)
        taken = ((ONE << word(size)) - ONE) << word(at)
        put(desk, WIDE + kind, mask_field(desk, WIDE + kind) | taken)
        put(desk, WIDE_INNER, mask_field(desk, WIDE_INNER) | (taken & (taken - ONE) & ~(ONE << word(at))))
        if kind == SPACE and at + size < left and _class_at(block + at + size, classes)[0] != SPACE:
            put(desk, WIDE_FORCED, mask_field(desk, WIDE_FORCED) | ONE << word(at))
        wide &= ~taken
        if at + size > 64:
            put(desk, CARRY, at + size - 64 | kind << 8)


@helper
def _list_bits(bits: int, at: int, starts: int, count: int) -> int:
    """Append ``at`` + n to the list at ``starts`` for each bit n. Writes up to 16 too many. Returns the new count."""
    found = count_bits(bits)
    place = starts + 4 * count
    for i in range(8):
        write_32(place + 4 * i, at + lowest_bit(bits))
        bits &= bits - ONE
    if found > 8:
        for i in range(8, 16):
            write_32(place + 4 * i, at + lowest_bit(bits))
            bits &= bits - ONE
        i = 16
        while bits != NOTHING:
            write_32(place + 4 * i, at + lowest_bit(bits))
            bits &= bits - ONE
            i += 1
    return count + found


@helper
def _contraction(place: int) -> int:
    """Return the bytes of the contraction whose apostrophe is at an address, 0 when there is none: 's 'd 'm 't 'll."""
    data = read_32(place) >> 8
    a, ab = data & 0xFF, data & 0xFFFF
    if a == ord("s") or a == ord("t") or a == ord("d") or a == ord("m"):
        return 2
    if ab == 0x6C6C or ab == 0x6576 or ab == 0x6572:  # ll, ve, re, the first letter lowest
        return 3
    return 0


def scan_gpt2(desk: int) -> int:
    """Find the starts of GPT-2's words.

    A run of letters, of digits or of others is a word, with the plain space before it. A run of white space starts one,
    and its last character starts another when something follows: alone, or as the space before a word.
    """
    view, size, at, classes, starts = (
        field(desk, d.VIEW), field(desk, d.SIZE), field(desk, d.AT), field(desk, d.CLASSES), field(desk, d.STARTS),
    )  # fmt: skip
    stop = min(at + d.STRETCH, size)
    last_letter, last_digit, last_other = (
        mask_field(desk, LAST_LETTER),
        mask_field(desk, LAST_DIGIT),
        mask_field(desk, LAST_OTHER),
    )
    last_white, last_space = mask_field(desk, LAST_WHITE), mask_field(desk, LAST_SPACE)
    clear_next, start_next = mask_field(desk, CLEAR_NEXT), mask_field(desk, START_NEXT)
    letters, digits, white = mask_field(desk, NEXT_LETTERS), mask_field(desk, NEXT_DIGITS), mask_field(desk, NEXT_WHITE)
    spaces, apostrophes = mask_field(desk, NEXT_SPACES), mask_field(desk, NEXT_APOSTROPHES)
    forced, wide_white = mask_field(desk, NEXT_FORCED), mask_field(desk, NEXT_WIDE_WHITE)
    is_ready = field(desk, READY) != 0
    has_carry = field(desk, CARRY) != 0
    if not is_ready:
        at -= 64
    count = number(0)
    while at < stop:
        ahead = at + 64
        next_letters, next_digits, next_white, next_spaces = NOTHING, NOTHING, ALL, NOTHING
        next_apostrophes, next_forced, next_wide_white = NOTHING, NOTHING, NOTHING
        if ahead < size:
            next_letters, next_digits, next_white, next_spaces, wide, next_apostrophes = sort_64(view + ahead)
            if wide != NOTHING or has_carry:
                _sort_wide(view + ahead, size - ahead, classes, desk, wide)
                has_carry = field(desk, CARRY) != 0
                next_letters |= (
                    mask_field(desk, WIDE + UPPER) | mask_field(desk, WIDE + LOWER) | mask_field(desk, WIDE + LETTER)
                )
                next_digits |= mask_field(desk, WIDE + NUMBER)
                next_wide_white = mask_field(desk, WIDE + SPACE)
                next_white |= next_wide_white
                next_forced = mask_field(desk, WIDE_FORCED)
            if ahead + 64 > size:  # the end of a text counts as white space: no white space is the last before it
                beyond = ALL << word(size - ahead)
                next_white |= beyond
                next_letters, next_digits = next_letters & ~beyond, next_digits & ~beyond
                next_spaces, next_apostrophes = next_spaces & ~beyond, next_apostrophes & ~beyond
        if is_ready:
            other = ~(letters | digits | white)
            goes_on = (
                (letters & ((letters << ONE) | last_letter))
                | (digits & ((digits << ONE) | last_digit))
                | (other & ((other << ONE) | last_other))
            )
            solid = ~white & ~goes_on & ~((spaces << ONE) | last_space)
            before_white = (white >> ONE) | (next_white << word(63))
            found = solid | (white & (~((white << ONE) | last_white) | ~(before_white | wide_white))) | forced
            checked = apostrophes & found
            found = (found & ~clear_next) | start_next
            clear_next, start_next = NOTHING, NOTHING
            while checked != NOTHING:
                i = lowest_bit(checked)
                checked &= checked - ONE
                length = _contraction(view + at + i)
                if length != 0 and at + i + length <= size:
                    for k in range(i + 1, i + length):
                        if k < 64:
                            found &= ~(ONE << word(k))
                        else:
                            clear_next |= ONE << word(k - 64)
                    if i + length < 64:
                        found |= ONE << word(i + length)
                    else:
                        start_next |= ONE << word(i + length - 64)
            if ahead > size:
                found &= ~(ALL << word(size - at))
            count = _list_bits(found, at, starts, count)
            last_letter, last_digit, last_other = letters >> word(63), digits >> word(63), other >> word(63)
            last_white, last_space = white >> word(63), spaces >> word(63)
        letters, digits, white, spaces = next_letters, next_digits, next_white, next_spaces
        apostrophes, forced, wide_white = next_apostrophes, next_forced, next_wide_white
        is_ready = True
        at = ahead
    put(desk, READY, 1)
    put(desk, LAST_LETTER, last_letter)
    put(desk, LAST_DIGIT, last_digit)
    put(desk, LAST_OTHER, last_other)
    put(desk, LAST_WHITE, last_white)
    put(desk, LAST_SPACE, last_space)
    put(desk, CLEAR_NEXT, clear_next)
    put(desk, START_NEXT, start_next)
    put(desk, NEXT_LETTERS, letters)
    put(desk, NEXT_DIGITS, digits)
    put(desk, NEXT_WHITE, white)
    put(desk, NEXT_SPACES, spaces)
    put(desk, NEXT_APOSTROPHES, apostrophes)
    put(desk, NEXT_FORCED, forced)
    put(desk, NEXT_WIDE_WHITE, wide_white)
    return count


@helper
def _sort_block(view: int, at: int, size: int, classes: int, desk: int) -> None:
    """Sort the bytes of the block at ``at`` into the masks NEXT_, for the scanners that need them all.

    NEXT_LETTERS has all letters, NEXT_MARKS marks, NEXT_INNER the bytes after the first of a character. What is behind
    the end of the text counts as white space: then no white space is the last before something.
    """
    letters, digits, white, spaces, apostrophes = NOTHING, NOTHING, ALL, NOTHING, NOTHING
    upper, ends, slashes, marks, inner, forced, wide_white = (
        NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING,
    )  # fmt: skip
    lower = NOTHING
    if at < size:
        letters, digits, white, spaces, wide, apostrophes = sort_64(view + at)
        upper, ends, slashes = sort_64_more(view + at)
        lower = letters & ~upper
        if wide != NOTHING or field(desk, CARRY) != 0:
            _sort_wide(view + at, size - at, classes, desk, wide)
            upper |= mask_field(desk, WIDE + UPPER)
            lower |= mask_field(desk, WIDE + LOWER)
            letters |= upper | lower | mask_field(desk, WIDE + LETTER)
            digits |= mask_field(desk, WIDE + NUMBER)
            marks = mask_field(desk, WIDE + MARK)
            wide_white = mask_field(desk, WIDE + SPACE)
            white |= wide_white
            inner, forced = mask_field(desk, WIDE_INNER), mask_field(desk, WIDE_FORCED)
        if at + 64 > size:
            beyond = ALL << word(size - at)
            white |= beyond
            letters, digits, spaces, apostrophes = (
                letters & ~beyond, digits & ~beyond, spaces & ~beyond, apostrophes & ~beyond,
            )  # fmt: skip
            upper, lower, ends, slashes = upper & ~beyond, lower & ~beyond, ends & ~beyond, slashes & ~beyond
    put(desk, NEXT_LETTERS, letters)
    put(desk, NEXT_DIGITS, digits)
    put(desk, NEXT_WHITE, white)
    put(desk, NEXT_SPACES, spaces)
    put(desk, NEXT_APOSTROPHES, apostrophes)
    put(desk, NEXT_FORCED, forced)
    put(desk, NEXT_WIDE_WHITE, wide_white)
    put(desk, NEXT_UPPER, upper)
    put(desk, NEXT_LOWER, lower)
    put(desk, NEXT_MARKS, marks)
    put(desk, NEXT_ENDS, ends)
    put(desk, NEXT_SLASHES, slashes)
    put(desk, NEXT_INNER, inner)


@helper
def _after(bits: int, last: int) -> int:
    """Return which bytes come after those in ``bits``; ``last`` says whether the last of the block before was one."""
    return (bits << ONE) | last


@helper
def _fill(seeds: int, runs: int) -> int:
    """Return, of each run of set bits in ``runs``, those from its lowest seed on. Seeds lie in runs.

    Adding a seed to a run turns it, from the seed up, into zeros: what has changed is what was asked for. A second
    seed in the same run is then added to a zero.
    """
    return (((seeds + runs) ^ runs) | seeds) & runs


@helper
def _digit_groups(digits: int, inner: int, desk: int) -> int:
    """Return the starts of the words among digits, which have three characters, or what is left of a run."""
    if digits == NOTHING:
        return NOTHING
    found, group = NOTHING, field(desk, GROUP)
    run_starts = digits & ~_after(digits, mask_field(desk, LAST_DIGIT))
    rest = digits & ~inner
    while rest != NOTHING:
        lowest = rest & (~rest + ONE)
        rest &= rest - ONE
        if lowest & run_starts != NOTHING:
            group = 0
        if group == 0:
            found |= lowest
        group = group + 1 if group < 2 else 0
    put(desk, GROUP, group)
    return found


@helper
def _after_block(at: int, desk: int) -> int:
    """Return where the first character begins that lies behind the block at ``at``, the next one being sorted."""
    return at + 64 + lowest_bit(~mask_field(desk, NEXT_INNER))


@helper
def _white_starts(
    view: int, at: int, size: int, white: int, ends: int, last_end: int, keeps_end: bool, desk: int
) -> int:
    """Return where words start in white space, but for its first character and its last.

    White space up to its last line end is a word, so that one starts after it. A text that ends in white space with a
    line end has all of it in one word, unless ``keeps_end``.
    """
    plain = white & ~ends
    found = plain & _after(ends, last_end)
    if found == NOTHING:
        return found
    behind = (plain + found) & ~plain & ends  # line ends where the run of one that was found ends
    while behind != NOTHING:
        lowest = behind & (~behind + ONE)
        behind &= behind - ONE
        found &= ~(ONE << word(63 - zeros_above(found & (lowest - ONE))))
    top = 64 - zeros_above(~plain)  # where the run begins that reaches the end of the block
    if top < 64 and found >> word(top) & ONE != NOTHING:
        place = _after_block(at, desk)
        kind = number(SPACE)
        while place < size and kind == SPACE:
            byte = read_byte(view + place)
            if byte == ord("\n") or byte == ord("\r"):
                return found & ~(ONE << word(top))
            kind, length = _class_at(view + place, field(desk, d.CLASSES))
            place += length
        if kind == SPACE and not keeps_end:
            found &= ~(ONE << word(top))
    return found


@helper
def _contraction_of_any_case(place: int) -> int:
    """Return what `_contraction` does for 's 'D 'm 'T 'Ll ..., and with a long s."""
    data = read_32(place) >> 8
    if data & 0xFFFF == 0xBFC5:  # the two bytes of U+017F
        return 3
    a, ab = (data & 0xFF) | 0x20, (data & 0xFFFF) | 0x2020
    if data & 0x40 != 0 and (a == ord("s") or a == ord("t") or a == ord("d") or a == ord("m")):
        return 2
    if data & 0x4040 == 0x4040 and (ab == 0x6C6C or ab == 0x6576 or ab == 0x6572):
        return 3
    return 0


@helper
def _lone(others: int, other_starts: int, spaces: int, inner: int, desk: int) -> int:
    """Return the first characters of runs of others that have no space before them: what a word of letters may have."""
    first = other_starts & ~_after(spaces, mask_field(desk, LAST_SPACE))
    rest = others & inner
    return first | _fill(rest & _after(first, mask_field(desk, LAST_LONE)), rest)


def scan_cl100k(desk: int) -> int:
    """Find the starts of GPT-4's words.

    Letters take the character before them: a white space but a line end, or another that no other is next to. Others
    take the plain space before them, and the line ends behind them. Digits come in groups of three.
    """
    view, size, at, classes, starts = (
        field(desk, d.VIEW), field(desk, d.SIZE), field(desk, d.AT), field(desk, d.CLASSES), field(desk, d.STARTS),
    )  # fmt: skip
    stop = min(at + d.STRETCH, size)
    if field(desk, READY) == 0:
        _sort_block(view, at, size, classes, desk)
        put(desk, READY, 1)
    count = number(0)
    while at < stop:
        letters, digits, white = (
            mask_field(desk, NEXT_LETTERS), mask_field(desk, NEXT_DIGITS), mask_field(desk, NEXT_WHITE),
        )  # fmt: skip
        spaces, apostrophes = mask_field(desk, NEXT_SPACES), mask_field(desk, NEXT_APOSTROPHES)
        forced, wide_white = mask_field(desk, NEXT_FORCED), mask_field(desk, NEXT_WIDE_WHITE)
        ends, inner = mask_field(desk, NEXT_ENDS), mask_field(desk, NEXT_INNER)
        _sort_block(view, at + 64, size, classes, desk)
        others = ~(letters | digits | white)
        last_other, last_space = mask_field(desk, LAST_OTHER), mask_field(desk, LAST_SPACE)
        other_starts = others & ~_after(others, last_other)
        taken = _fill(ends & (_after(others, last_other) | mask_field(desk, LAST_TAKEN)), ends)
        white &= ~taken
        ends &= ~taken
        before_white = (white >> ONE) | (mask_field(desk, NEXT_WHITE) << word(63))
        found = white & ~_after(white, mask_field(desk, LAST_WHITE))
        found |= (white & ~ends & ~before_white & ~wide_white) | forced
        found |= _white_starts(view, at, size, white, ends, mask_field(desk, LAST_END), False, desk)
        lone = _lone(others, other_starts, spaces, inner, desk)
        found |= other_starts & ~_after(spaces, last_space)
        taking = _after(lone, mask_field(desk, LAST_LONE)) | _after(
            white & ~ends, mask_field(desk, LAST_WHITE) & ~mask_field(desk, LAST_END)
        )
        found |= letters & ~_after(letters, mask_field(desk, LAST_LETTER)) & ~taking
        found |= _digit_groups(digits, inner, desk)
        checked = apostrophes & found
        found |= mask_field(desk, START_NEXT)
        put(desk, START_NEXT, 0)
        while checked != NOTHING:
            i = lowest_bit(checked)
            checked &= checked - ONE
            length = _contraction_of_any_case(view + at + i)
            if length != 0 and i + length < 64:
                found |= ONE << word(i + length)
            elif length != 0:
                put(desk, START_NEXT, ONE << word(i + length - 64))
        if at + 64 > size:
            found &= ~(ALL << word(size - at))
        count = _list_bits(found, at, starts, count)
        put(desk, LAST_LETTER, letters >> word(63))
        put(desk, LAST_DIGIT, digits >> word(63))
        put(desk, LAST_OTHER, others >> word(63))
        put(desk, LAST_WHITE, white >> word(63))
        put(desk, LAST_SPACE, spaces >> word(63))
        put(desk, LAST_END, ends >> word(63))
        put(desk, LAST_TAKEN, taken >> word(63))
        put(desk, LAST_LONE, lone >> word(63))
        at += 64
    return count


@helper
def _highest(bits: int) -> int:
    """Return the place of the highest bit that is set, -1 when none is."""
    return 63 - zeros_above(bits)


@helper
def _is_cut_before_capitals(view: int, place: int, size: int, i: int, upper: int, letters: int, desk: int) -> bool:
    """Return whether a word of GPT-4o that has no lower-case letter yet ends before the capitals at ``i``.

    It goes on if letters of another kind follow the capitals: then all before them may be the first part of the word,
    in which capitals stand.

    Args:
        view: Address of the text.
        place: Offset of the block.
        size: Bytes of the text.
        i: Where in the block the capitals begin.
        upper: Which bytes of the block are capitals.
        letters: Which are letters or marks.
        desk: Where the classes are.
    """
    end = lowest_bit(~upper & (ALL << word(i)))
    if end < 64:
        return letters >> word(end) & ONE == NOTHING
    place = _after_block(place, desk)
    kind = number(UPPER)
    while place < size and kind == UPPER:
        kind, length = _class_at(view + place, field(desk, d.CLASSES))
        place += length
    return kind != LOWER and kind != LETTER and kind != MARK


@helper
def _marks_of_others(others: int, marks: int, spaces: int, ends: int, slashes: int, inner: int, desk: int) -> int:
    """Return the marks that go on a run of others; any other mark is as good as a letter.

    A mark after a lone other is the first of a word of letters that the other belongs to. After more of them, or one
    with a space before it, it is one of them.
    """
    found = NOTHING
    last_other = mask_field(desk, LAST_OTHER)
    checked = marks & _after(others, last_other)
    while checked != NOTHING:
        lowest = checked & (~checked + ONE)
        checked &= checked - ONE
        with_marks = others | found
        taken = _taken(with_marks, ends, slashes, desk)
        left = with_marks & ~taken
        starts = left & ~_after(left, last_other & ~mask_field(desk, LAST_TAKEN))
        lone = _lone(left, starts, spaces, inner, desk)
        if (
            lowest & (_after(lone, mask_field(desk, LAST_LONE)) | _after(taken, mask_field(desk, LAST_TAKEN)))
            == NOTHING
        ):
            run = _fill(lowest, marks)
            found |= run
            checked = (checked & ~run) | (marks & _after(run, NOTHING) & ~run)
    return found


@helper
def _taken(others: int, ends: int, slashes: int, desk: int) -> int:
    """Return the line ends and slashes that belong to the run of others before them."""
    runs = ends | (slashes & others)
    seeds = (ends & _after(others, mask_field(desk, LAST_OTHER))) | (runs & mask_field(desk, LAST_TAKEN))
    return _fill(seeds, runs)


def scan_o200k(desk: int) -> int:
    """Find the starts of GPT-4o's words.

    As for GPT-4, but a word of letters ends before a capital that follows others letters than capitals, and has the
    contraction that follows it; marks are letters unless they follow others; others also take slashes after line ends.
    """
    view, size, at, classes, starts = (
        field(desk, d.VIEW), field(desk, d.SIZE), field(desk, d.AT), field(desk, d.CLASSES), field(desk, d.STARTS),
    )  # fmt: skip
    stop = min(at + d.STRETCH, size)
    if field(desk, READY) == 0:
        _sort_block(view, at, size, classes, desk)
        put(desk, READY, 1)
    count = number(0)
    while at < stop:
        letters, digits, white = (
            mask_field(desk, NEXT_LETTERS), mask_field(desk, NEXT_DIGITS), mask_field(desk, NEXT_WHITE),
        )  # fmt: skip
        spaces, apostrophes = mask_field(desk, NEXT_SPACES), mask_field(desk, NEXT_APOSTROPHES)
        forced, wide_white = mask_field(desk, NEXT_FORCED), mask_field(desk, NEXT_WIDE_WHITE)
        ends, inner, slashes = mask_field(desk, NEXT_ENDS), mask_field(desk, NEXT_INNER), mask_field(desk, NEXT_SLASHES)
        upper, lower, marks = mask_field(desk, NEXT_UPPER), mask_field(desk, NEXT_LOWER), mask_field(desk, NEXT_MARKS)
        _sort_block(view, at + 64, size, classes, desk)
        last_other, last_space = mask_field(desk, LAST_OTHER), mask_field(desk, LAST_SPACE)
        last_letter, last_taken = mask_field(desk, LAST_LETTER), mask_field(desk, LAST_TAKEN)
        others = ~(letters | marks | digits | white)
        if marks & _after(others, last_other) != NOTHING:
            moved = _marks_of_others(others, marks, spaces, ends, slashes, inner, desk)
            others |= moved
            marks &= ~moved
        letters |= marks
        taken = _taken(others, ends, slashes, desk)
        put(desk, LAST_OTHER, others >> word(63))
        others &= ~taken
        white &= ~taken
        ends &= ~taken
        other_starts = others & ~_after(others, last_other & ~last_taken)
        before_white = (white >> ONE) | (mask_field(desk, NEXT_WHITE) << word(63))
        found = white & ~_after(white, mask_field(desk, LAST_WHITE))
        found |= (white & ~ends & ~before_white & ~wide_white) | forced
        found |= _white_starts(view, at, size, white, ends, mask_field(desk, LAST_END), True, desk)
        lone = _lone(others, other_starts, spaces, inner, desk)
        taking = _after(lone, mask_field(desk, LAST_LONE)) | _after(
            white & ~ends, mask_field(desk, LAST_WHITE) & ~mask_field(desk, LAST_END)
        )
        found |= letters & ~_after(letters, last_letter) & ~taking
        found |= upper & _after(lower, mask_field(desk, LAST_LOWER))
        found |= _digit_groups(digits, inner, desk)
        found &= ~mask_field(desk, CLEAR_NEXT)
        cut = mask_field(desk, START_NEXT)
        put(desk, CLEAR_NEXT, 0)
        put(desk, START_NEXT, 0)
        checked = apostrophes & other_starts & _after(letters, last_letter)
        other_starts &= ~_after(spaces, last_space)
        while checked != NOTHING:
            i = lowest_bit(checked)
            bit = ONE << word(i)
            checked &= checked - ONE
            length = 0 if cut & bit != NOTHING else _contraction_of_any_case(view + at + i)
            if length != 0:
                other_starts &= ~bit
                if i + 2 < 64:
                    found &= ~(ONE << word(i + 2))
                elif length == 3:
                    put(desk, CLEAR_NEXT, ONE << word(i + 2 - 64))
                if i + length < 64:
                    cut |= ONE << word(i + length)
                else:
                    put(desk, START_NEXT, ONE << word(i + length - 64))
        found |= other_starts | cut
        caseless = letters & ~upper & ~lower
        checked = upper & _after(caseless, mask_field(desk, LAST_CASELESS)) & ~found
        while checked != NOTHING:
            i = lowest_bit(checked)
            bit = ONE << word(i)
            checked &= checked - ONE
            start = _highest(found & (bit - ONE))
            has_lower = lower & (bit - ONE) if start < 0 else lower & (bit - ONE) & (ALL << word(start))
            if (
                has_lower != NOTHING
                or (start < 0 and field(desk, HAS_LOWER) != 0)
                or _is_cut_before_capitals(view, at, size, i, upper, letters, desk)
            ):
                found |= bit
        start = _highest(found)
        if start >= 0:
            put(desk, HAS_LOWER, 1 if lower >> word(start) != NOTHING else 0)
        elif lower != NOTHING:
            put(desk, HAS_LOWER, 1)
        if at + 64 > size:
            found &= ~(ALL << word(size - at))
        count = _list_bits(found, at, starts, count)
        put(desk, LAST_LETTER, letters >> word(63))
        put(desk, LAST_DIGIT, digits >> word(63))
        put(desk, LAST_WHITE, white >> word(63))
        put(desk, LAST_SPACE, spaces >> word(63))
        put(desk, LAST_END, ends >> word(63))
        put(desk, LAST_TAKEN, taken >> word(63))
        put(desk, LAST_LONE, lone >> word(63))
        put(desk, LAST_LOWER, lower >> word(63))
        put(desk, LAST_CASELESS, caseless >> word(63))
        at += 64
    return count


def find_pairs(desk: int) -> int:
    """List where two bytes, PAIR_SOUGHT, stand in TEXTS: the beginning of what may be special tokens.

    PLACES_FOUND receives (number of the text, offset), 8 bytes each, until FOUND_ROOM are listed; then the next call
    goes on at offset AT of text number TEXT. Returns how many are listed.
    """
    texts, out, room = field(desk, d.TEXTS), field(desk, d.PLACES_FOUND), field(desk, d.FOUND_ROOM)
    first, second = field(desk, d.PAIR_SOUGHT) & 0xFF, field(desk, d.PAIR_SOUGHT) >> 8
    text, at, count = field(desk, d.TEXT), field(desk, d.AT), number(0)
    while text < field(desk, d.TEXT_COUNT):
        place, size = read_int(texts + 16 * text), read_int(texts + 16 * text + 8)
        while at + 1 < size:
            step, found = number(64), NOTHING
            if at + 65 <= size:
                found = pairs_64(place + at, first, second)
            else:
                step = number(1)
                if read_byte(place + at) == first and read_byte(place + at + 1) == second:
                    found = ONE
            if found != NOTHING and count + 64 > room:
                put(desk, d.TEXT, text)
                put(desk, d.AT, at)
                return count
            while found != NOTHING:
                write_64(out + 16 * count, text)
                write_64(out + 16 * count + 8, at + lowest_bit(found))
                found &= found - ONE
                count += 1
            at += step
        text += 1
        at = number(0)
    put(desk, d.TEXT, text)
    return count
