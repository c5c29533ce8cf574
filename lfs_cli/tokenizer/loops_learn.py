"""Learning, as compiled loops: counting words, then merging the most frequent pair again and again.

    count_words      how often each word of some texts occurs      learn.count_words
    add_counts       the sum of two such tables
    list_words       the words of a table, one after another
    spell_words      the words as tokens of one byte, and their first pairs
    make_merges      learning                                      learn.learn_reference

A token is kept where it lies. Over the bytes of all words, with a separator before and behind each, there is an array
TOKENS that holds, for a token of the id t at the bytes i to i + n, t at its first and t at its last place. The token
after it begins at i + n, the one before it ends at i - 1, so there are no links to keep. When two tokens become one,
the place where the second began is cleared, so that nothing takes it for the start of a token.

    place         0   1   2   3   4   5
    bytes             l   o   w
    TOKENS       -1   l   o   w  -1            then (o, w) becomes t:    -1   l   t   t  -1

A row of PAIRS is what is known of a pair of tokens, in 32 bytes:

    count (8)  first (8)  size (4)  left (4)  right (4)        it occurs at PLACES[first : first + size]

A place where the pair no longer stands, since another merge took one of its tokens, is met and skipped: its count is
always right, its places are a list of candidates. New pairs are only made around the places of a merge, so their places
are listed once, by counting sort, when it is over.

HEAP holds (count, row) with the pair that is merged next on top. A count that is out of date when it comes up is put
right and goes down again; that is enough, as counts of old pairs only fall.

Importing this file imports numba.
"""

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer.loops_words import (
    KEY_SIZE,
    begin_text,
    copy_bytes,
    enter_long,
    enter_middle,
    enter_short,
    find_long,
    find_middle,
    find_short,
    has_arena,
    hash_long,
    hash_short,
    look_up,
    scan_stretch,
    slot_of,
)
from lfs_cli.tokenizer.vectors import (
    field,
    helper,
    masked_32,
    number,
    prefetch,
    put,
    read_32,
    read_byte,
    read_int,
    read_word,
    swap_32,
    word,
    write_32,
    write_64,
)

NOTHING = word(0)
SEPARATOR = 0xFFFFFFFF
GONE = 0xFFFFFFFE
_GOLDEN = word(0x9E3779B97F4A7C15)

ROW_SIZE = 32
FIRST, SIZE, LEFT, RIGHT = 8, 16, 20, 24
"""Where the parts of a row are, in bytes."""

AHEAD = 16
"""Places of a pair whose memory is asked for before they are looked at."""


@helper
def _add_short(low: int, high: int, first: int, amount: int, desk: int) -> None:
    """Add to the count of a short word whose first slot is ``first``."""
    slot = find_short(low, high, first, desk)
    if read_word(slot + 8) == NOTHING:
        write_64(slot + 16, amount)
        enter_short(slot, low, high, desk)
        return
    write_64(slot + 16, read_int(slot + 16) + amount)
    if slot != first:  # the word that comes now is likely to come again: let it have the first slot
        swap_32(slot, first)


@helper
def _add_middle(w: int, x: int, y: int, z: int, amount: int, desk: int) -> None:
    """Add to the count of a word of 16 to 31 bytes."""
    slot = find_middle(w, x, y, z, desk)
    if read_word(slot + 24) == NOTHING:
        write_64(slot + 32, amount)
        enter_middle(slot, w, x, y, z, desk)
    else:
        write_64(slot + 32, read_int(slot + 32) + amount)


@helper
def _add_long(place: int, size: int, amount: int, desk: int) -> bool:
    """Add to the count of a word of 32 bytes or more. Returns False, with SCRATCH_NEEDED set, if it finds no room."""
    mixed = hash_long(place, size)
    slot = find_long(place, size, mixed, desk)
    if read_word(slot) == NOTHING:
        if not has_arena(size, desk):
            put(desk, d.SCRATCH_NEEDED, size)
            return False
        write_64(slot + 16, amount)
        enter_long(slot, place, size, mixed, desk)
    else:
        write_64(slot + 16, read_int(slot + 16) + amount)
    return True


@helper
def _count_rarer(view: int, place: int, size: int, key: int, desk: int) -> bool:
    """Count a word that the first look did not find; the arguments are those of `loops_encode._encode_rarer`."""
    if size < 16:
        _add_short(read_word(key), read_word(key + 8), read_int(key + 16), 1, desk)
        return True
    if size < 32:
        w, x, y, z = masked_32(view, field(desk, d.KEEP) + 32 * size)
        _add_middle(w, x, y, z | word(size) << word(56), 1, desk)
        return True
    return _add_long(place, size, 1, desk)


def count_words(desk: int) -> int:
    """Count the words of the texts from number TEXT on, until a table is full.

    TEXTS lists the address and the bytes of each text.

    Returns:
        0 at the end. Else 1: the words so far are counted and cut off from TEXTS, and the next call goes on.
    """
    texts, starts, keys = field(desk, d.TEXTS), field(desk, d.POSITIONS), field(desk, d.KEYS)
    for number_of_text in range(field(desk, d.TEXT), field(desk, d.TEXT_COUNT)):
        text, size = read_int(texts + 16 * number_of_text), read_int(texts + 16 * number_of_text + 8)
        begin_text(desk, size)
        at, held = number(0), number(0)
        while at < size:
            words = scan_stretch(text, size, at, held, starts, desk) - 1
            at += d.STRETCH
            held = number(1)
            look_up(starts, words, desk)
            view = field(desk, d.VIEW)
            key, done = keys, number(0)
            while done < words:
                slot = read_int(key + 16)
                if (read_word(key) ^ read_word(slot)) | (read_word(key + 8) ^ read_word(slot + 8)) == NOTHING:
                    write_64(slot + 16, read_int(slot + 16) + 1)
                else:
                    start = read_32(starts + 4 * done)
                    size_of_word = read_32(starts + 4 * done + 4) - start
                    if not _count_rarer(view + start, text + start, size_of_word, key, desk):
                        break
                key += KEY_SIZE
                done += 1
            next_start = read_32(starts + 4 * done)
            if done < words or field(desk, d.FULL) != 0:
                write_64(texts + 16 * number_of_text, text + next_start)
                write_64(texts + 16 * number_of_text + 8, size - next_start)
                put(desk, d.TEXT, number_of_text)
                return 1
            write_32(starts, next_start)
    put(desk, d.TEXT, field(desk, d.TEXT_COUNT))
    return 0


def add_counts(desk: int) -> int:
    """Add the words at the desk OTHER that occur LEAST_COUNT times or more, from slot OTHER_SLOT of its tables on.

    Returns:
        0 at the end. Else 1: this desk is full, and the next call goes on.
    """
    other, least = field(desk, d.OTHER), field(desk, d.LEAST_COUNT)
    short_slots, middle_slots = number(1) << field(other, d.SHORT_BITS), number(1) << field(other, d.MIDDLE_BITS)
    long_slots, arena = number(1) << field(other, d.LONG_BITS), field(other, d.ARENA)
    for i in range(field(desk, d.OTHER_SLOT), short_slots + middle_slots + long_slots):
        is_done = field(desk, d.FULL) == 0
        if is_done and i < short_slots:
            slot = field(other, d.SHORT) + 32 * i
            low, high, amount = read_word(slot), read_word(slot + 8), read_int(slot + 16)
            if high != NOTHING and amount >= least:
                first = slot_of(hash_short(low, high), field(desk, d.SHORT), field(desk, d.SHORT_BITS), 32)
                _add_short(low, high, first, amount, desk)
        elif is_done and i < short_slots + middle_slots:
            slot = field(other, d.MIDDLE) + 64 * (i - short_slots)
            last, amount = read_word(slot + 24), read_int(slot + 32)
            if last != NOTHING and amount >= least:
                _add_middle(read_word(slot), read_word(slot + 8), read_word(slot + 16), last, amount, desk)
        elif is_done:
            slot = field(other, d.LONG) + 32 * (i - short_slots - middle_slots)
            where, amount = read_int(slot + 8), read_int(slot + 16)
            if read_word(slot) != NOTHING and amount >= least:
                is_done = _add_long(arena + (where >> 32), where & 0xFFFFFFFF, amount, desk)
        if not is_done:
            put(desk, d.OTHER_SLOT, i)
            return 1
    return 0


def list_words(desk: int) -> int:
    """Write the bytes of all words to WORD_LETTERS, their ends to WORD_ENDS and their counts to WORD_COUNTS."""
    letters, ends, counts = field(desk, d.WORD_LETTERS), field(desk, d.WORD_ENDS), field(desk, d.WORD_COUNTS)
    listed, used = number(0), number(0)
    for kind in range(2):
        table = field(desk, d.SHORT) if kind == 0 else field(desk, d.MIDDLE)
        slots = number(1) << (field(desk, d.SHORT_BITS) if kind == 0 else field(desk, d.MIDDLE_BITS))
        width = 32 << kind
        for i in range(slots):
            slot = table + width * i
            size = read_byte(slot + (width >> 1) - 1)
            if size != 0:
                copy_bytes(letters + used, slot, size)
                used += size
                write_64(ends + 8 * listed, used)
                write_64(counts + 8 * listed, read_int(slot + (width >> 1)))
                listed += 1
    arena = field(desk, d.ARENA)
    for i in range(number(1) << field(desk, d.LONG_BITS)):
        slot = field(desk, d.LONG) + 32 * i
        if read_word(slot) != NOTHING:
            where = read_int(slot + 8)
            copy_bytes(letters + used, arena + (where >> 32), where & 0xFFFFFFFF)
            used += where & 0xFFFFFFFF
            write_64(ends + 8 * listed, used)
            write_64(counts + 8 * listed, read_int(slot + 16))
            listed += 1
    return listed


def spell_words(desk: int) -> int:
    """Write words as tokens of one byte to TOKENS_OF_WORDS, and list the places of their pairs.

    The words are WORD_LETTERS, WORD_ENDS and WORD_COUNTS, of which there are WORD_COUNT. WEIGHTS receives, for each of
    the 65,536 pairs of bytes, its count, and behind them all where its places end in PLACES; those of a pair follow
    those of the pair before it. Returns how many places there are.
    """
    letters, ends, counts = field(desk, d.WORD_LETTERS), field(desk, d.WORD_ENDS), field(desk, d.WORD_COUNTS)
    tokens, words, places = field(desk, d.TOKENS_OF_WORDS), field(desk, d.WORDS_OF_PLACES), field(desk, d.PLACES)
    weights = field(desk, d.WEIGHTS)
    next_place = weights + 8 * 65536
    write_32(tokens, SEPARATOR)
    at, start = number(1), number(0)
    for i in range(field(desk, d.WORD_COUNT)):
        end, amount = read_int(ends + 8 * i), read_int(counts + 8 * i)
        before = number(-1)
        for k in range(start, end):
            byte = read_byte(letters + k)
            write_32(tokens + 4 * at, byte)
            write_32(words + 4 * at, i)
            at += 1
            if before >= 0:
                pair = 8 * (before << 8 | byte)
                write_64(weights + pair, read_int(weights + pair) + amount)
                write_64(next_place + pair, read_int(next_place + pair) + 1)
            before = byte
        write_32(tokens + 4 * at, SEPARATOR)
        at += 1
        start = end
    listed = number(0)
    for pair in range(65536):
        size = read_int(next_place + 8 * pair)
        write_64(next_place + 8 * pair, listed)
        listed += size
    for i in range(1, at - 1):
        left, right = read_32(tokens + 4 * i), read_32(tokens + 4 * i + 4)
        if left != SEPARATOR and right != SEPARATOR:
            pair = 8 * (left << 8 | right)
            place = read_int(next_place + pair)
            write_32(places + 4 * place, i)
            write_64(next_place + pair, place + 1)
    return listed


@helper
def _row(desk: int, pair: int) -> int:
    return field(desk, d.ROWS) + ROW_SIZE * pair


@helper
def _compare(a: int, b: int, desk: int) -> int:
    """Return a number above, below or equal to 0 as the bytes of token ``a`` are greater, less or equal."""
    prefixes = field(desk, d.PREFIXES)
    first, second = read_word(prefixes + 8 * a), read_word(prefixes + 8 * b)
    if first != second:
        return 1 if first > second else -1
    ends, letters = field(desk, d.TOKEN_ENDS), field(desk, d.LETTERS)
    i, j = read_int(ends + 8 * a), read_int(ends + 8 * b)
    last_i, last_j = read_int(ends + 8 * a + 8), read_int(ends + 8 * b + 8)
    while i < last_i and j < last_j:
        difference = read_byte(letters + i) - read_byte(letters + j)
        if difference != 0:
            return difference
        i += 1
        j += 1
    return (last_i - i) - (last_j - j)


@helper
def _is_before(count: int, pair: int, other_count: int, other: int, desk: int) -> bool:
    """Return whether ``pair`` is merged before ``other``: the more frequent one, then as TIES says.

    TIES is 0 for the greater pair of byte strings, 1 for the smaller pair of numbers in ORDER.
    """
    if count != other_count:
        return count > other_count
    row, other_row = _row(desk, pair), _row(desk, other)
    left, other_left = read_32(row + LEFT), read_32(other_row + LEFT)
    right, other_right = read_32(row + RIGHT), read_32(other_row + RIGHT)
    if field(desk, d.TIES) == 0:
        if left != other_left:
            return _compare(left, other_left, desk) > 0
        return right != other_right and _compare(right, other_right, desk) > 0
    order = field(desk, d.ORDER)
    if left != other_left:
        return read_32(order + 4 * left) < read_32(order + 4 * other_left)
    return read_32(order + 4 * right) < read_32(order + 4 * other_right)


@helper
def _rise(count: int, pair: int, desk: int) -> None:
    """Put a pair into the heap."""
    heap, i = field(desk, d.HEAP), field(desk, d.HEAP_COUNT)
    put(desk, d.HEAP_COUNT, i + 1)
    while i > 0:
        parent = heap + 16 * ((i - 1) >> 1)
        if not _is_before(count, pair, read_int(parent), read_int(parent + 8), desk):
            break
        write_64(heap + 16 * i, read_int(parent))
        write_64(heap + 16 * i + 8, read_int(parent + 8))
        i = (i - 1) >> 1
    write_64(heap + 16 * i, count)
    write_64(heap + 16 * i + 8, pair)


@helper
def _sink(count: int, pair: int, desk: int) -> None:
    """Put a pair into the heap in place of its top."""
    heap, size, i = field(desk, d.HEAP), field(desk, d.HEAP_COUNT), number(0)
    while 2 * i + 1 < size:
        child = 2 * i + 1
        at = heap + 16 * child
        if child + 1 < size and _is_before(read_int(at + 16), read_int(at + 24), read_int(at), read_int(at + 8), desk):
            child += 1
            at += 16
        if not _is_before(read_int(at), read_int(at + 8), count, pair, desk):
            break
        write_64(heap + 16 * i, read_int(at))
        write_64(heap + 16 * i + 8, read_int(at + 8))
        i = child
    write_64(heap + 16 * i, count)
    write_64(heap + 16 * i + 8, pair)


@helper
def _pair_slot(left: int, right: int, desk: int) -> int:
    """Return the address of the slot with the number of a pair, from 1 on, or of the free one where it belongs."""
    slots, bits = field(desk, d.PAIR_SLOTS), field(desk, d.PAIR_SLOTS_BITS)
    slot = number(((word(left) << word(32) | word(right)) * _GOLDEN) >> word(64 - bits))
    while True:
        pair = read_32(slots + 4 * slot)
        if pair == 0:
            return slots + 4 * slot
        row = _row(desk, pair - 1)
        if read_32(row + LEFT) == left and read_32(row + RIGHT) == right:
            return slots + 4 * slot
        slot = (slot + 1) & ((number(1) << bits) - 1)


def fill_pair_slots(desk: int) -> int:
    """Enter all PAIR_ROWS pairs into free PAIR_SLOTS."""
    for pair in range(field(desk, d.PAIR_ROWS)):
        row = _row(desk, pair)
        write_32(_pair_slot(read_32(row + LEFT), read_32(row + RIGHT), desk), pair + 1)
    return 0


@helper
def _token_size(token: int, desk: int) -> int:
    ends = field(desk, d.TOKEN_ENDS)
    return read_int(ends + 8 * token + 8) - read_int(ends + 8 * token)


@helper
def _spell(pair: int, merged: int, desk: int) -> None:
    """Write the bytes of a new token behind those of the others, and its first eight as a number."""
    ends, letters, row = field(desk, d.TOKEN_ENDS), field(desk, d.LETTERS), _row(desk, pair)
    start = read_int(ends + 8 * merged)
    at = start
    for part in (LEFT, RIGHT):
        token = read_32(row + part)
        copy_bytes(letters + at, letters + read_int(ends + 8 * token), _token_size(token, desk))
        at += _token_size(token, desk)
    write_64(ends + 8 * merged + 8, at)
    prefix = NOTHING
    for i in range(8):
        prefix <<= word(8)
        if start + i < at:
            prefix |= word(read_byte(letters + start + i))
    write_64(field(desk, d.PREFIXES) + 8 * merged, prefix)
    write_32(field(desk, d.ORDER) + 4 * merged, merged)


@helper
def _lacks_room(pair: int, desk: int) -> bool:
    """Return whether merging a pair may need more room. Each place makes up to two new pairs, which have places."""
    row = _row(desk, pair)
    places = 2 * read_32(row + SIZE)
    pairs = field(desk, d.PAIR_ROWS) + min(places, 2 * (257 + field(desk, d.MERGES)))
    size = _token_size(read_32(row + LEFT), desk) + _token_size(read_32(row + RIGHT), desk)
    used = read_int(field(desk, d.TOKEN_ENDS) + 8 * (256 + field(desk, d.MERGES)))
    return (
        pairs > field(desk, d.PAIR_ROWS_SIZE)
        or field(desk, d.HEAP_COUNT) + pairs - field(desk, d.PAIR_ROWS) > field(desk, d.HEAP_SIZE)
        or 2 * pairs > number(1) << field(desk, d.PAIR_SLOTS_BITS)
        or field(desk, d.PLACES_USED) + places > field(desk, d.PLACES_SIZE)
        or places > field(desk, d.FOUND_SIZE)
        or used + size > field(desk, d.LETTERS_SIZE)
    )


def make_merges(desk: int) -> int:
    """Make merges until UNTIL are made, no pair is left, or an array has to grow (NEEDED is not 0).

    Merge number n makes the token 256 + n of two tokens, which are written to MADE. Token t has the bytes of LETTERS
    from TOKEN_ENDS[t] to TOKEN_ENDS[t + 1]. Returns 0.
    """
    put(desk, d.NEEDED, 0)
    while field(desk, d.MERGES) < field(desk, d.UNTIL) and field(desk, d.HEAP_COUNT) > 0:
        heap = field(desk, d.HEAP)
        count, best = read_int(heap), read_int(heap + 8)
        row = _row(desk, best)
        if read_int(row) != count and read_int(row) > 0:
            _sink(read_int(row), best, desk)
            continue
        if read_int(row) > 0 and _lacks_room(best, desk):
            put(desk, d.NEEDED, 2 * read_32(row + SIZE))
            return 0
        last = heap + 16 * (field(desk, d.HEAP_COUNT) - 1)
        put(desk, d.HEAP_COUNT, field(desk, d.HEAP_COUNT) - 1)
        _sink(read_int(last), read_int(last + 8), desk)
        if read_int(row) <= 0:
            continue
        made = field(desk, d.MERGES)
        write_64(field(desk, d.MADE) + 8 * made, read_int(row + LEFT))
        _spell(best, 256 + made, desk)
        first_new = field(desk, d.PAIR_ROWS)
        _merge_everywhere(best, 256 + made, desk)
        for pair in range(first_new, field(desk, d.PAIR_ROWS)):
            new_row = _row(desk, pair)
            write_32(_pair_slot(read_32(new_row + LEFT), read_32(new_row + RIGHT), desk), pair + 1)
            if read_int(new_row) > 0:
                _rise(read_int(new_row), pair, desk)
        put(desk, d.MERGES, made + 1)
    return 0


@helper
def _new_pair(left: int, right: int, desk: int) -> int:
    """Make a row for a pair and return its number."""
    pair = field(desk, d.PAIR_ROWS)
    put(desk, d.PAIR_ROWS, pair + 1)
    row = _row(desk, pair)
    write_64(row, 0)
    write_32(row + SIZE, 0)
    write_32(row + LEFT, left)
    write_32(row + RIGHT, right)
    return pair


@helper
def _gain(pair: int, amount: int, place: int, noted: int, desk: int) -> None:
    """Count a new pair at a place, and note the two: note number ``noted``."""
    row, found = _row(desk, pair), field(desk, d.FOUND)
    write_64(row, read_int(row) + amount)
    write_32(row + SIZE, read_32(row + SIZE) + 1)
    write_32(found + 8 * noted, pair)
    write_32(found + 8 * noted + 4, place)


@helper
def _lose(token: int, amount: int, losses: int, seen: int, count: int) -> int:
    """Sum up what the pair of a neighbour loses, to look it up once. Returns how many neighbours there are by now."""
    loss = read_int(losses + 8 * token)
    write_64(losses + 8 * token, loss + amount)
    if loss == 0:
        write_32(seen + 4 * count, token)
        return count + 1
    return count


@helper
def _merge_everywhere(best: int, merged: int, desk: int) -> None:
    """Merge the pair ``best``, tokens a and b, into t = ``merged`` wherever it occurs.

    With x before and y after them, the pairs (x, a) and (b, y) become (x, t) and (t, y). The new ones have no rows yet:
    LEFT_NEW[x] and RIGHT_NEW[y] are their numbers, which count only if they are at least those of this merge. Where
    two merges are neighbours, the second one makes the pair (t, t) of both.
    """
    tokens, words, counts = field(desk, d.TOKENS_OF_WORDS), field(desk, d.WORDS_OF_PLACES), field(desk, d.WORD_COUNTS)
    left_new, right_new = field(desk, d.LEFT_NEW), field(desk, d.RIGHT_NEW)
    left_losses, right_losses = field(desk, d.LEFT_LOSSES), field(desk, d.RIGHT_LOSSES)
    left_seen, right_seen = field(desk, d.LEFT_SEEN), field(desk, d.RIGHT_SEEN)
    row, places, first_new = _row(desk, best), field(desk, d.PLACES), field(desk, d.PAIR_ROWS)
    a, b = read_32(row + LEFT), read_32(row + RIGHT)
    size_a, size_b, size = _token_size(a, desk), _token_size(b, desk), read_32(row + SIZE)
    lefts, rights, noted = number(0), number(0), number(0)
    places += 4 * read_int(row + FIRST)
    for k in range(size):
        prefetch(tokens + 4 * read_32(places + 4 * min(k + AHEAD, size - 1)))
        i = read_32(places + 4 * k)
        j = i + size_a
        if read_32(tokens + 4 * i) != a or read_32(tokens + 4 * j) != b:
            continue
        last = j + size_b - 1
        amount = read_int(counts + 8 * read_32(words + 4 * i))
        x, y = read_32(tokens + 4 * (i - 1)), read_32(tokens + 4 * (last + 1))
        write_32(tokens + 4 * j, GONE)  # first, since a token of one byte begins and ends at the same place
        write_32(tokens + 4 * i, merged)
        write_32(tokens + 4 * last, merged)
        if x == merged:
            pair = read_32(right_new + 4 * merged)
            if pair < first_new:
                pair = _new_pair(merged, merged, desk)
                write_32(right_new + 4 * merged, pair)
            _gain(pair, amount, i - size_a - size_b, noted, desk)
            noted += 1
        elif x != SEPARATOR:
            lefts = _lose(x, amount, left_losses, left_seen, lefts)
            pair = read_32(left_new + 4 * x)
            if pair < first_new:
                pair = _new_pair(x, merged, desk)
                write_32(left_new + 4 * x, pair)
            _gain(pair, amount, i - _token_size(x, desk), noted, desk)
            noted += 1
        if y != SEPARATOR:
            rights = _lose(y, amount, right_losses, right_seen, rights)
            if y == a and read_32(tokens + 4 * (last + 1 + size_a)) == b:
                continue  # y is merged next, and then finds t before it
            pair = read_32(right_new + 4 * y)
            if pair < first_new:
                pair = _new_pair(merged, y, desk)
                write_32(right_new + 4 * y, pair)
            _gain(pair, amount, i, noted, desk)
            noted += 1
    for k in range(lefts):
        x = read_32(left_seen + 4 * k)
        _take(x, a, x, left_losses, desk)
    for k in range(rights):
        y = read_32(right_seen + 4 * k)
        _take(b, y, y, right_losses, desk)
    write_64(_row(desk, best), 0)
    _list_places(first_new, noted, desk)


@helper
def _take(left: int, right: int, token: int, losses: int, desk: int) -> None:
    """Take from the count of an old pair what it lost, and clear the sum."""
    row = _row(desk, read_32(_pair_slot(left, right, desk)) - 1)
    write_64(row, read_int(row) - read_int(losses + 8 * token))
    write_64(losses + 8 * token, 0)


@helper
def _list_places(first_new: int, noted: int, desk: int) -> None:
    """List in PLACES, pair by pair, where the new pairs occur: a counting sort of the notes."""
    used, found, places = field(desk, d.PLACES_USED), field(desk, d.FOUND), field(desk, d.PLACES)
    for pair in range(first_new, field(desk, d.PAIR_ROWS)):
        row = _row(desk, pair)
        write_64(row + FIRST, used)
        used += read_32(row + SIZE)
        write_32(row + SIZE, 0)
    put(desk, d.PLACES_USED, used)
    for k in range(noted):
        row = _row(desk, read_32(found + 8 * k))
        size = read_32(row + SIZE)
        write_32(places + 4 * (read_int(row + FIRST) + size), read_32(found + 8 * k + 4))
        write_32(row + SIZE, size + 1)
