"""Encoding, as compiled loops: words that were met before come from a table, others are merged.

    encode_texts    the ids of many texts             bpe.merge_word, word by word
    merge_short     a word of up to 16 bytes          bpe.merge_word
    merge_middle    a word of up to 64 bytes          bpe.merge_word
    merge_long      any word, in O(n log n)           bpe.merge_word
    add_words       fills the table beforehand
    fill_pairs      makes the table of merges
    move_words      moves words to a larger table

A merge is a pair of ids. Its rank, the place in the list of merges, is found in a hash table with slots of 8 bytes:
20 bits for the left id, 20 for the right one, 24 for the rank; all bits set mark a free slot. Most pairs that are asked
for are none, and for nearly all of these a filter of a million bits says so, which is small enough for a near cache: a
bit is set where the hash of a merge points to. Pairs of single bytes, with which each word begins, are looked up in an
array of 65,536 ranks instead.

Importing this file imports numba.
"""

from lfs_cli.tokenizer import desk as d
from lfs_cli.tokenizer.loops_words import (
    KEY_SIZE,
    begin_text,
    enter_long,
    enter_middle,
    enter_short,
    find_long,
    find_middle,
    find_short,
    has_arena,
    hash_long,
    hash_middle,
    hash_short,
    look_up,
    scan_stretch,
    slot_of,
)
from lfs_cli.tokenizer.vectors import (
    ALL,
    ONE,
    copy_16,
    field,
    helper,
    lowest_bit,
    masked_16,
    masked_32,
    number,
    put,
    read_16,
    read_32,
    read_byte,
    read_int,
    read_word,
    sixteen_at,
    sixteen_largest,
    smallest_of,
    swap_32,
    with_entry,
    word,
    write_16,
    write_32,
    write_64,
    write_byte,
    zeros_above,
)

NOTHING = word(0)
NO_RANK = 0xFFFFFF
NO_PAIR = 0xFFFFFFFF
GONE = 0xFFFFFFFF
_GOLDEN = word(0x9E3779B97F4A7C15)

LONGEST_KEPT = 1024
"""Bytes of the longest word that is remembered."""

SCRATCH_PER_BYTE = 20
"""Bytes of scratch that `merge_long` needs for each byte of the word."""


@helper
def _filter_byte(mixed: int) -> int:
    """Return the byte of the filter that a hash belongs to: 20 bits say which of its bits."""
    return number(mixed >> word(47))


@helper
def _filter_bit(mixed: int) -> int:
    """Return the bit in that byte."""
    return 1 << number((mixed >> word(44)) & word(7))


@helper
def _rank(left: int, right: int, desk: int) -> int:
    """Return the rank of the merge of two ids, `NO_RANK` when there is none."""
    pairs, bits = field(desk, d.PAIRS), field(desk, d.PAIR_BITS)
    key = word(left) << word(20) | word(right)
    mixed = key * _GOLDEN
    if read_byte(field(desk, d.PAIR_FILTER) + _filter_byte(mixed)) & _filter_bit(mixed) == 0:
        return NO_RANK
    slot = mixed >> word(64 - bits)
    while True:
        found = read_word(pairs + 8 * number(slot))
        if found >> word(24) == key:
            return number(found & word(NO_RANK))
        if found == ALL:
            return NO_RANK
        slot = (slot + ONE) & ((ONE << word(bits)) - ONE)


def fill_pairs(desk: int) -> int:
    """Enter PAIR_COUNT merges, a list of (left id, right id, rank) of 32 bits each, into the free table and filter."""
    pairs, bits, at = field(desk, d.PAIRS), field(desk, d.PAIR_BITS), field(desk, d.PAIR_LIST)
    for _ in range(field(desk, d.PAIR_COUNT)):
        key = word(read_32(at)) << word(20) | word(read_32(at + 4))
        mixed = key * _GOLDEN
        byte = field(desk, d.PAIR_FILTER) + _filter_byte(mixed)
        write_byte(byte, read_byte(byte) | _filter_bit(mixed))
        slot = mixed >> word(64 - bits)
        while read_word(pairs + 8 * number(slot)) != ALL:
            slot = (slot + ONE) & ((ONE << word(bits)) - ONE)
        write_64(pairs + 8 * number(slot), key << word(24) | word(read_32(at + 8)))
        at += 12
    return 0


@helper
def merge_short(place: int, size: int, desk: int) -> int:
    """Merge a word of up to 16 bytes. Its ids are in TOKENS afterwards; returns how many there are.

    The token that begins at byte i stays at place i of TOKENS, and ``ranks`` has there `rank << 6 | i` for its merge
    with the next token. So the smallest of them is the next merge, the leftmost of equal ones, and nothing is moved:
    bit i of ``alive`` says whether a token begins at i. The ranks stay in a register: what is written to memory in
    small parts cannot be read in a large one at once.
    """
    tokens, merged_ids = field(desk, d.TOKENS), field(desk, d.MERGED_IDS)
    byte_ids, byte_pairs = field(desk, d.BYTE_IDS), field(desk, d.BYTE_PAIRS)
    ranks = sixteen_largest()
    before = read_byte(place)
    write_32(tokens, read_32(byte_ids + 4 * before))
    for i in range(1, size):
        byte = read_byte(place + i)
        write_32(tokens + 4 * i, read_32(byte_ids + 4 * byte))
        rank = read_32(byte_pairs + 4 * (before << 8 | byte))
        ranks = with_entry(ranks, i - 1, rank << 6 | (i - 1) if rank != NO_PAIR else NO_PAIR)
        before = byte
    alive = ALL >> word(64 - size)
    while True:
        best = smallest_of(ranks)
        if best == NO_PAIR:
            break
        left = best & 63
        after = alive & ~((word(2) << word(left)) - ONE)
        right = lowest_bit(after)
        merged = read_32(merged_ids + 4 * (best >> 6))
        write_32(tokens + 4 * left, merged)
        alive &= ~(ONE << word(right))
        after &= after - ONE
        below = alive & ((ONE << word(left)) - ONE)
        ranks = with_entry(ranks, right, NO_PAIR)
        ranks = with_entry(
            ranks, left, _entry(left, merged, read_32(tokens + 4 * lowest_bit(after | _LAST)), after, desk)
        )
        previous = 63 - zeros_above(below | ONE)
        entry = _entry(previous, read_32(tokens + 4 * previous), merged, below, desk)
        if below != NOTHING:
            ranks = with_entry(ranks, previous, entry)
    return _gather(alive, desk)


_LAST = word(1) << word(16)
"""Stands for the end of a short word; what lies there is not looked at."""


@helper
def _entry(at: int, left: int, right: int, neighbours: int, desk: int) -> int:
    """Return `rank << 6 | at` for the merge of two ids, `NO_PAIR` if there is none or no neighbour is left."""
    if neighbours == NOTHING:
        return NO_PAIR
    rank = _rank(left, right, desk)
    return rank << 6 | at if rank != NO_RANK else NO_PAIR


@helper
def _gather(alive: int, desk: int) -> int:
    """Move the ids of the tokens that are alive to the front of TOKENS. Returns how many there are."""
    tokens, count = field(desk, d.TOKENS), number(0)
    while alive != NOTHING:
        write_32(tokens + 4 * count, read_32(tokens + 4 * lowest_bit(alive)))
        count += 1
        alive &= alive - ONE
    return count


@helper
def merge_middle(place: int, size: int, desk: int) -> int:
    """Merge a word of up to 64 bytes in the same way, with the ranks in RANKS."""
    tokens, ranks, merged_ids = field(desk, d.TOKENS), field(desk, d.RANKS), field(desk, d.MERGED_IDS)
    byte_ids, byte_pairs = field(desk, d.BYTE_IDS), field(desk, d.BYTE_PAIRS)
    padded = (size + 15) & ~15
    for i in range(0, padded, 2):
        write_64(ranks + 4 * i, ALL)
    before = read_byte(place)
    write_32(tokens, read_32(byte_ids + 4 * before))
    for i in range(1, size):
        byte = read_byte(place + i)
        write_32(tokens + 4 * i, read_32(byte_ids + 4 * byte))
        rank = read_32(byte_pairs + 4 * (before << 8 | byte))
        if rank != NO_PAIR:
            write_32(ranks + 4 * (i - 1), rank << 6 | (i - 1))
        before = byte
    alive = ALL >> word(64 - size)
    while True:
        best = smallest_of(sixteen_at(ranks))
        for i in range(16, padded, 16):
            best = min(best, smallest_of(sixteen_at(ranks + 4 * i)))
        if best == NO_PAIR:
            break
        left = best & 63
        after = alive & ~((word(2) << word(left)) - ONE)
        right = lowest_bit(after)
        merged = read_32(merged_ids + 4 * (best >> 6))
        write_32(tokens + 4 * left, merged)
        write_32(ranks + 4 * right, NO_PAIR)
        alive &= ~(ONE << word(right))
        after &= after - ONE
        next_token = read_32(tokens + 4 * lowest_bit(after)) if after != NOTHING else 0
        write_32(ranks + 4 * left, _entry(left, merged, next_token, after, desk))
        below = alive & ((ONE << word(left)) - ONE)
        if below != NOTHING:
            previous = 63 - zeros_above(below)
            write_32(ranks + 4 * previous, _entry(previous, read_32(tokens + 4 * previous), merged, below, desk))
    return _gather(alive, desk)


@helper
def _push(heap: int, size: int, entry: int) -> int:
    """Put an entry into a heap whose smallest is the first. Returns the new size."""
    i = size
    while i > 0 and read_word(heap + 8 * ((i - 1) >> 1)) > entry:
        write_64(heap + 8 * i, read_word(heap + 8 * ((i - 1) >> 1)))
        i = (i - 1) >> 1
    write_64(heap + 8 * i, entry)
    return size + 1


@helper
def _pop(heap: int, size: int) -> int:
    """Remove the first entry. Returns the new size."""
    size -= 1
    entry = read_word(heap + 8 * size)
    i = number(0)
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and read_word(heap + 8 * child + 8) < read_word(heap + 8 * child):
            child += 1
        if read_word(heap + 8 * child) >= entry:
            break
        write_64(heap + 8 * i, read_word(heap + 8 * child))
        i = child
    write_64(heap + 8 * i, entry)
    return size


@helper
def _offer(heap: int, count: int, left: int, right: int, at: int, desk: int) -> int:
    """Put the pair of ids at ``at`` into the heap if it is a merge: the lowest rank first, then the leftmost."""
    rank = _rank(left, right, desk)
    if rank == NO_RANK:
        return count
    return _push(heap, count, word(rank) << word(40) | word(at))


@helper
def merge_long(place: int, size: int, desk: int, out: int) -> int:
    """Merge a word of any length in O(n log n). Writes its ids to ``out`` and returns how many there are.

    A token lies at its first byte and at its last byte in an array over the bytes of the word. The token after one of
    n bytes at i begins at i + n, the one before it ends at i - 1, so there are no links to keep. When two are merged,
    the place where the second began is cleared, so that nothing takes it for the start of a token. The heap holds
    pairs; one that no longer stands when it comes up is dropped.
    """
    byte_ids, merged_ids, sizes = field(desk, d.BYTE_IDS), field(desk, d.MERGED_IDS), field(desk, d.TOKEN_SIZES)
    heap = field(desk, d.SCRATCH)
    tokens = heap + 16 * size
    count = number(0)
    before = number(0)
    for i in range(size):
        token = read_32(byte_ids + 4 * read_byte(place + i))
        write_32(tokens + 4 * i, token)
        if i > 0:
            count = _offer(heap, count, before, token, i - 1, desk)
        before = token
    while count > 0:
        best = read_word(heap)
        count = _pop(heap, count)
        i = number(best & word(0xFFFFFFFFFF))
        left = read_32(tokens + 4 * i)
        if left == GONE:
            continue
        j = i + read_32(sizes + 4 * left)
        if j >= size:
            continue
        right = read_32(tokens + 4 * j)
        rank = number(best >> word(40))
        if right == GONE or _rank(left, right, desk) != rank:
            continue  # an earlier merge has taken one of the two
        merged = read_32(merged_ids + 4 * rank)
        last = j + read_32(sizes + 4 * right) - 1
        write_32(tokens + 4 * j, GONE)  # first, since a token of one byte begins and ends at the same place
        write_32(tokens + 4 * i, merged)
        write_32(tokens + 4 * last, merged)
        if i > 0:
            before = read_32(tokens + 4 * (i - 1))
            count = _offer(heap, count, before, merged, i - read_32(sizes + 4 * before), desk)
        if last + 1 < size:
            count = _offer(heap, count, merged, read_32(tokens + 4 * (last + 1)), i, desk)
    shift, written, i = field(desk, d.ID_SHIFT), number(0), number(0)
    while i < size:
        token = read_32(tokens + 4 * i)
        _put_id(out, written, token, shift)
        written += 1
        i += read_32(sizes + 4 * token)
    return written


@helper
def _put_id(ids: int, i: int, id: int, shift: int) -> None:
    """Write an id of 2 bytes (``shift`` is 1) or of 4 (2) as number ``i`` of a list."""
    if shift == 1:
        write_16(ids + 2 * i, id)
    else:
        write_32(ids + 4 * i, id)


@helper
def _copy_ids(target: int, source: int, count: int, shift: int) -> None:
    """Copy ids, 16 bytes at a time: up to 16 bytes too many."""
    for i in range(0, count << shift, 16):
        copy_16(target + i, source + i)


@helper
def _give_ids(slot: int, room: int, ids: int, count: int, desk: int) -> None:
    """Write the ids of a word as its value, which has ``room`` bytes at ``slot``; to the pool if they are too many."""
    shift = field(desk, d.ID_SHIFT)
    if count << shift <= room - 2:
        for i in range(count):
            if shift == 1:
                write_16(slot + 2 * i, read_16(ids + 2 * i))
            else:
                write_32(slot + 4 * i, read_32(ids + 4 * i))
        write_16(slot + room - 2, count)
        return
    used = field(desk, d.POOL_USED)
    _copy_ids(field(desk, d.POOL) + (used << shift), ids, count, shift)
    put(desk, d.POOL_USED, used + count)
    write_32(slot, used)
    write_32(slot + 4, count)
    write_16(slot + room - 2, 0)


@helper
def _take_ids(slot: int, room: int, out: int, desk: int) -> int:
    """Write the ids that are the value of a word to ``out`` and return how many there are."""
    count = read_16(slot + room - 2)
    if count != 0:
        copy_16(out, slot)
        if room == 32:
            copy_16(out + 16, slot + 16)
        return count
    count, shift = read_32(slot + 4), field(desk, d.ID_SHIFT)
    _copy_ids(out, field(desk, d.POOL) + (read_32(slot) << shift), count, shift)
    return count


@helper
def _merge(place: int, size: int, desk: int, out: int) -> int:
    """Merge a word, write its ids to ``out`` and return how many there are; -1 when the scratch is too small."""
    if size > 64:
        if SCRATCH_PER_BYTE * size > field(desk, d.SCRATCH_SIZE):
            put(desk, d.SCRATCH_NEEDED, SCRATCH_PER_BYTE * size)
            return -1
        return merge_long(place, size, desk, out)
    count = merge_short(place, size, desk) if size <= 16 else merge_middle(place, size, desk)
    tokens, shift = field(desk, d.TOKENS), field(desk, d.ID_SHIFT)
    for i in range(count):
        _put_id(out, i, read_32(tokens + 4 * i), shift)
    return count


@helper
def _has_room(size: int, ids: int, desk: int) -> bool:
    """Return whether a word can be remembered; the desk is full when one that is not too long cannot."""
    if size > LONGEST_KEPT or field(desk, d.FULL) != 0:
        return False
    if field(desk, d.POOL_USED) + ids + 16 > field(desk, d.POOL_SIZE):
        put(desk, d.FULL, 1)
        return False
    return size < 32 or has_arena(size, desk)


@helper
def _encode_rarer(view: int, place: int, size: int, key: int, desk: int, out: int) -> int:
    """Write the ids of a word that the first look did not find, and remember them.

    Args:
        view: Address of the word where bytes after it can be read, for words of less than 32 bytes.
        place: Its address in the text.
        size: Its bytes.
        key: Where `look_up` noted its key.
        desk: Tables and merges.
        out: Where the ids go.

    Returns:
        How many ids there are; -1 when the scratch must grow first.
    """
    if size < 16:
        low, high = read_word(key), read_word(key + 8)
        first = read_int(key + 16)
        slot = find_short(low, high, first, desk)
        if read_word(slot + 8) != NOTHING:
            if slot != first:  # the word that comes now is likely to come again: let it have the first slot
                swap_32(slot, first)
            return _take_ids(first + 16, 16, out, desk)
        count = _merge(view, size, desk, out)
        if _has_room(size, count, desk):
            _give_ids(slot + 16, 16, out, count, desk)
            enter_short(slot, low, high, desk)
        return count
    if size < 32:
        w, x, y, z = masked_32(view, field(desk, d.KEEP) + 32 * size)
        z |= word(size) << word(56)
        slot = find_middle(w, x, y, z, desk)
        if read_word(slot + 24) != NOTHING:
            return _take_ids(slot + 32, 32, out, desk)
        count = _merge(view, size, desk, out)
        if _has_room(size, count, desk):
            _give_ids(slot + 32, 32, out, count, desk)
            enter_middle(slot, w, x, y, z, desk)
        return count
    if size > LONGEST_KEPT:
        return _merge(place, size, desk, out)
    mixed = hash_long(place, size)
    slot = find_long(place, size, mixed, desk)
    if read_word(slot) != NOTHING:
        return _take_ids(slot + 16, 16, out, desk)
    count = _merge(place, size, desk, out)
    if count >= 0 and _has_room(size, count, desk):
        _give_ids(slot + 16, 16, out, count, desk)
        enter_long(slot, place, size, mixed, desk)
    return count


def encode_texts(desk: int) -> int:
    """Encode the texts from number TEXT on, until a table is full.

    TEXTS lists the address and the bytes of each text; or, for a special token, its id and -1. The ids go to IDS, where
    there must be room for one a byte and 64 more. ENDS receives, for each text, how many ids there are up to its end.

    Returns:
        0 at the end. Else 1: the words met so far are encoded and cut off from TEXTS, and after something has grown,
        because the desk is FULL or SCRATCH_NEEDED, the next call goes on.
    """
    ids, shift, texts = field(desk, d.IDS), field(desk, d.ID_SHIFT), field(desk, d.TEXTS)
    starts, keys = field(desk, d.POSITIONS), field(desk, d.KEYS)
    out = ids + (field(desk, d.WRITTEN) << shift)
    number_of_text = field(desk, d.TEXT)
    stopped = number(0)
    while number_of_text < field(desk, d.TEXT_COUNT) and stopped == 0:
        text, size = read_int(texts + 16 * number_of_text), read_int(texts + 16 * number_of_text + 8)
        if size < 0:
            _put_id(out, 0, text, shift)
            out += 1 << shift
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
                high, slot = read_word(key + 8), read_int(key + 16)
                if (read_word(key) ^ read_word(slot)) | (high ^ read_word(slot + 8)) == NOTHING:
                    count = read_16(slot + 30)
                    if count != 0:
                        copy_16(out, slot + 16)
                        out += count << shift
                        key += KEY_SIZE
                        done += 1
                        continue
                start = read_32(starts + 4 * done)
                size_of_word = read_32(starts + 4 * done + 4) - start
                count = _encode_rarer(view + start, text + start, size_of_word, key, desk, out)
                if count < 0:
                    break
                out += count << shift
                key += KEY_SIZE
                done += 1
            next_start = read_32(starts + 4 * done)
            if done < words or (field(desk, d.FULL) != 0 and next_start < size):
                write_64(texts + 16 * number_of_text, text + next_start)
                write_64(texts + 16 * number_of_text + 8, size - next_start)
                stopped = number(1)
                break
            write_32(starts, next_start)
        if stopped == 0:
            write_64(field(desk, d.ENDS) + 8 * number_of_text, (out - ids) >> shift)
            number_of_text += 1
            if field(desk, d.FULL) != 0 and number_of_text < field(desk, d.TEXT_COUNT):
                stopped = number(1)
    put(desk, d.TEXT, number_of_text)
    put(desk, d.WRITTEN, (out - ids) >> shift)
    return stopped


def add_words(desk: int) -> int:
    """Remember TEXTS, each as one word, from number TEXT on. Returns 0, or 1 when the desk is full before the end."""
    texts, out = field(desk, d.TEXTS), field(desk, d.IDS)
    for i in range(field(desk, d.TEXT), field(desk, d.TEXT_COUNT)):
        place, size = read_int(texts + 16 * i), read_int(texts + 16 * i + 8)
        count = _merge(place, size, desk, out)
        if not _has_room(size, count, desk):
            put(desk, d.TEXT, i)
            return 1
        _enter(place, size, out, count, desk)
    put(desk, d.TEXT, field(desk, d.TEXT_COUNT))
    return 0


@helper
def _enter(place: int, size: int, ids: int, count: int, desk: int) -> None:
    """Remember the ids of a word of up to `LONGEST_KEPT` bytes, after which 32 can be read, if it is not there yet."""
    if size < 16:
        low, high = masked_16(place, field(desk, d.KEEP) + 32 * size)
        high |= word(size) << word(56)
        slot = slot_of(hash_short(low, high), field(desk, d.SHORT), field(desk, d.SHORT_BITS), 32)
        slot = find_short(low, high, slot, desk)
        if read_word(slot + 8) == NOTHING:
            _give_ids(slot + 16, 16, ids, count, desk)
            enter_short(slot, low, high, desk)
    elif size < 32:
        w, x, y, z = masked_32(place, field(desk, d.KEEP) + 32 * size)
        z |= word(size) << word(56)
        slot = find_middle(w, x, y, z, desk)
        if read_word(slot + 24) == NOTHING:
            _give_ids(slot + 32, 32, ids, count, desk)
            enter_middle(slot, w, x, y, z, desk)
    else:
        mixed = hash_long(place, size)
        slot = find_long(place, size, mixed, desk)
        if read_word(slot) == NOTHING:
            _give_ids(slot + 16, 16, ids, count, desk)
            enter_long(slot, place, size, mixed, desk)


def move_words(desk: int) -> int:
    """Enter the words of a table at MOVE_FROM, of 2^MOVE_FROM_BITS slots, into a free one at MOVE_TO.

    MOVE_KIND says which table it is: 0 short, 1 middle, 2 long.
    """
    kind, source, target = field(desk, d.MOVE_KIND), field(desk, d.MOVE_FROM), field(desk, d.MOVE_TO)
    bits = field(desk, d.MOVE_TO_BITS)
    width = 64 if kind == 1 else 32
    mark = 24 if kind == 1 else 8 if kind == 0 else 0
    end = target + (width << bits)
    for i in range(1 << field(desk, d.MOVE_FROM_BITS)):
        slot = source + width * i
        if read_word(slot + mark) == NOTHING:
            continue
        mixed = read_word(slot)
        if kind == 0:
            mixed = hash_short(mixed, read_word(slot + 8))
        elif kind == 1:
            mixed = hash_middle(mixed, read_word(slot + 8), read_word(slot + 16), read_word(slot + 24))
        free = slot_of(mixed, target, bits, width)
        while read_word(free + mark) != NOTHING:
            free += width
            if free == end:
                free = target
        for k in range(0, width, 16):
            copy_16(free + k, slot + k)
    return 0
