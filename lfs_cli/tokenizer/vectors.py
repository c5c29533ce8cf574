"""Single instructions for the compiled loops: memory by address, bits of a word, 64 bytes at once.

The loops work on raw addresses (int64) instead of arrays: passing an array costs more than the work of a small
function. So nothing here checks a bound; whoever gives an address knows what lies there (`desk.py`).

Each function below stands for a few instructions of LLVM's language, which knows vectors of any size: the same source
becomes AVX-512, AVX2 or NEON code, whatever the machine has. Loads and stores need no alignment.

All words are unsigned. numba turns a sum of a signed and an unsigned number into a float: `word` makes a number one of
the second kind, `number` one of the first. Importing this file imports numba.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "_nrt": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""No checks for a division by 0, no counting of references to arrays, of which there are none, and no second entrance:
the machine code then calls nothing outside of itself, and can be used without numba (`machine_code`)."""

helper: Callable[[Any], Any] = njit(**OPTIONS)
"""Compiles a function into those that call it."""

word: Any = np.uint64
number: Any = np.int64
ONE: Any = np.uint64(1)
ALL: Any = np.uint64(0xFFFFFFFFFFFFFFFF)

_intrinsic: Callable[[Any], Any] = intrinsic

_BIT, _BYTE, _HALF, _QUARTER, _WORD = (ir.IntType(bits) for bits in (1, 8, 32, 16, 64))
_SIXTEEN = ir.VectorType(_BYTE, 16)
_SIXTY_FOUR = ir.VectorType(_BYTE, 64)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _read(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(_at(builder, address, kind))
    loaded.align = 1
    return loaded


def _write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, _at(builder, address, value.type)).align = 1


def _reader(kind: Any, returned: Any) -> Any:
    """Return an intrinsic that reads ``kind`` at an address."""

    @_intrinsic
    def read(context: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            loaded = _read(builder, values[0], kind)
            return loaded if kind is _WORD else builder.zext(loaded, _WORD)

        return returned(types.int64), build

    return read


def _writer(kind: Any) -> Any:
    """Return an intrinsic that writes the low bits of a number at an address, as a ``kind``."""

    @_intrinsic
    def write(context: Any, address: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            _write(builder, values[1] if kind is _WORD else builder.trunc(values[1], kind), values[0])
            return context.get_dummy_value()

        return types.void(types.int64, value if value in (types.int64, types.uint64) else types.int64), build

    return write


read_byte = _reader(_BYTE, types.int64)
read_16 = _reader(_QUARTER, types.int64)
read_32 = _reader(_HALF, types.int64)
read_int = _reader(_WORD, types.int64)
read_word = _reader(_WORD, types.uint64)
write_byte = _writer(_BYTE)
write_16 = _writer(_QUARTER)
write_32 = _writer(_HALF)
write_64 = _writer(_WORD)


def _field_reader(returned: Any) -> Any:
    """Return an intrinsic that reads field number ``place`` of a desk."""

    @_intrinsic
    def read(context: Any, desk: Any, place: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            eight = ir.Constant(_WORD, 8)
            return _read(builder, builder.add(values[0], builder.mul(values[1], eight)), _WORD)

        return returned(types.int64, types.int64), build

    return read


field = _field_reader(types.int64)
mask_field = _field_reader(types.uint64)


@_intrinsic
def put(context: Any, desk: Any, place: Any, value: Any) -> Any:
    """Set field number ``place`` of a desk."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = builder.add(values[0], builder.mul(values[1], ir.Constant(_WORD, 8)))
        _write(builder, values[2], at)
        return context.get_dummy_value()

    kind = value if value in (types.int64, types.uint64) else types.int64
    return types.void(types.int64, types.int64, kind), build


@_intrinsic
def lowest_bit(context: Any, bits: Any) -> Any:
    """Return the place of the lowest bit that is set, 64 when none is."""
    zero_is_fine = ir.Constant(_BIT, 0)
    return types.int64(types.uint64), lambda context, builder, signature, values: builder.cttz(values[0], zero_is_fine)


@_intrinsic
def zeros_above(context: Any, bits: Any) -> Any:
    """Return how many zeros stand above the highest bit that is set, 64 when none is."""
    zero_is_fine = ir.Constant(_BIT, 0)
    return types.int64(types.uint64), lambda context, builder, signature, values: builder.ctlz(values[0], zero_is_fine)


@_intrinsic
def count_bits(context: Any, bits: Any) -> Any:
    """Return how many bits are set."""
    return types.int64(types.uint64), lambda context, builder, signature, values: builder.ctpop(values[0])


@_intrinsic
def copy_16(context: Any, target: Any, source: Any) -> Any:
    """Copy 16 bytes."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _write(builder, _read(builder, values[1], _SIXTEEN), values[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@_intrinsic
def swap_32(context: Any, place: Any, other: Any) -> Any:
    """Exchange 32 bytes at two addresses."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.VectorType(_BYTE, 32)
        first, second = (_read(builder, value, kind) for value in values)
        _write(builder, first, values[1])
        _write(builder, second, values[0])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), build


@_intrinsic
def prefetch(context: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which will be needed soon."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _HALF, _HALF, _HALF])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        for_reading, in_all_caches, data = (ir.Constant(_HALF, value) for value in (0, 3, 1))
        builder.call(function, [_at(builder, values[0], _BYTE), for_reading, in_all_caches, data])
        return context.get_dummy_value()

    return types.void(types.int64), build


def _masked(words: int) -> Any:
    """Return an intrinsic that reads words at one address and keeps the bits that are set at another."""
    kind = ir.VectorType(_WORD, words)

    @_intrinsic
    def read(context: Any, address: Any, mask: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kept = builder.and_(_read(builder, values[0], kind), _read(builder, values[1], kind))
            parts = [builder.extract_element(kept, ir.Constant(_HALF, i)) for i in range(words)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(types.uint64, words)(types.int64, types.int64), build

    return read


masked_16 = _masked(2)
masked_32 = _masked(4)


class _Sixteen(types.Type):
    """Sixteen unsigned numbers of 32 bits, in a register where the machine has one so large."""

    def __init__(self) -> None:
        super().__init__("Sixteen")


_sixteen = _Sixteen()
_SIXTEEN_HALVES = ir.VectorType(_HALF, 16)


@register_model(_Sixteen)
class _SixteenModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _SIXTEEN_HALVES)


@_intrinsic
def sixteen_largest(context: Any) -> Any:
    """Return sixteen times the largest number of 32 bits."""
    return _sixteen(), lambda context, builder, signature, values: ir.Constant(_SIXTEEN_HALVES, [0xFFFFFFFF] * 16)


@_intrinsic
def sixteen_at(context: Any, address: Any) -> Any:
    """Return the sixteen numbers at an address."""
    return _sixteen(types.int64), lambda context, builder, signature, values: _read(builder, values[0], _SIXTEEN_HALVES)


@_intrinsic
def with_entry(context: Any, sixteen: Any, place: Any, value: Any) -> Any:
    """Return the sixteen numbers with another one at a place."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.insert_element(values[0], builder.trunc(values[2], _HALF), builder.trunc(values[1], _HALF))

    return _sixteen(_sixteen, types.int64, types.int64), build


@_intrinsic
def smallest_of(context: Any, sixteen: Any) -> Any:
    """Return the smallest of sixteen numbers."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        name = "llvm.vector.reduce.umin.v16i32"
        function = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(_HALF, [_SIXTEEN_HALVES]), name
        )
        return builder.zext(builder.call(function, [values[0]]), _WORD)

    return types.int64(_sixteen), build


@_intrinsic
def call(context: Any, function: Any, desk: Any) -> Any:
    """Call the compiled function at an address, which takes and returns an address or a number (`machine_code`)."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        error = _BYTE.as_pointer()
        kind = ir.FunctionType(_HALF, [_WORD.as_pointer(), error.as_pointer(), _WORD])
        result = builder.alloca(_WORD)
        builder.call(_at(builder, values[0], kind), [result, builder.alloca(error), values[1]])
        return builder.load(result)

    return types.int64(types.int64, types.int64), build


def _splat(byte: int) -> Any:
    return ir.Constant(_SIXTY_FOUR, [byte] * 64)


def _within(builder: Any, data: Any, first: str, count: int) -> Any:
    """Return which bytes are among ``count`` from ``first`` on."""
    return builder.icmp_unsigned("<", builder.sub(data, _splat(ord(first))), _splat(count))


@_intrinsic
def sort_64(context: Any, address: Any) -> Any:
    """Return which of 64 bytes are letters, digits, white space, plain spaces, not ASCII, and apostrophes.

    Each is a word whose bit n tells of byte n; letters, digits and white space are those of ASCII.
    """

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = _read(builder, values[0], _SIXTY_FOUR)
        letters = _within(builder, builder.or_(data, _splat(0x20)), "a", 26)
        digits = _within(builder, data, "0", 10)
        spaces = builder.icmp_unsigned("==", data, _splat(ord(" ")))
        white = builder.or_(spaces, _within(builder, data, "\t", 5))
        wide = builder.icmp_signed("<", data, _splat(0))
        apostrophes = builder.icmp_unsigned("==", data, _splat(ord("'")))
        masks = [builder.bitcast(mask, _WORD) for mask in (letters, digits, white, spaces, wide, apostrophes)]
        return context.make_tuple(builder, signature.return_type, masks)

    return types.UniTuple(types.uint64, 6)(types.int64), build


@_intrinsic
def sort_64_more(context: Any, address: Any) -> Any:
    """Return which of 64 bytes are capitals, line ends (CR or LF), and slashes, as `sort_64` does."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = _read(builder, values[0], _SIXTY_FOUR)
        capitals = _within(builder, data, "A", 26)
        ends = [builder.icmp_unsigned("==", data, _splat(ord(end))) for end in "\r\n"]
        slashes = builder.icmp_unsigned("==", data, _splat(ord("/")))
        masks = [builder.bitcast(mask, _WORD) for mask in (capitals, builder.or_(*ends), slashes)]
        return context.make_tuple(builder, signature.return_type, masks)

    return types.UniTuple(types.uint64, 3)(types.int64), build


@_intrinsic
def pairs_64(context: Any, address: Any, first: Any, second: Any) -> Any:
    """Return at which of 64 bytes two bytes begin that are ``first`` and ``second``; 65 bytes are read."""

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        zeros = ir.Constant(ir.VectorType(_HALF, 64), [0] * 64)
        found = []
        for offset, value in enumerate(values[1:]):
            byte = builder.trunc(value, _BYTE)
            one = builder.insert_element(ir.Constant(_SIXTY_FOUR, ir.Undefined), byte, ir.Constant(_HALF, 0))
            wanted = builder.shuffle_vector(one, ir.Constant(_SIXTY_FOUR, ir.Undefined), zeros)
            data = _read(builder, builder.add(values[0], ir.Constant(_WORD, offset)), _SIXTY_FOUR)
            found.append(builder.bitcast(builder.icmp_unsigned("==", data, wanted), _WORD))
        return builder.and_(*found)

    return types.uint64(types.int64, types.int64, types.int64), build
