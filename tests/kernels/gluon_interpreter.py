"""Run Gluon kernels on a CPU, as strictly as the hardware may behave. Gluon itself has no interpreter.

A kernel file is loaded with a stand-in for `gluon_compatibility`. Tensors become numpy arrays and layouts nothing; each
partition of a program becomes a thread, and barriers count arrivals and bytes. What the hardware may do early or late
is done at the worst moment:

    a copy into shared memory       fills the buffer with NaN when it starts, with numbers when somebody waits for it
    a product of a warpgroup        reads its factors in shared memory when it is waited for, not when it starts
    a copy out of shared memory     reads the buffer when it is waited for
    a group of copies by threads    reads and arrives when it is waited for; what its mask leaves out stays NaN

So a buffer that is released, refilled or overwritten too early gives wrong numbers. Beside that:

    DeadlockError  when every partition waits for a barrier that no one will complete
    HazardError    when a product or copy reads what was stored without a fence; when a result is used before it was
                   waited for; when a program ends before its copies do
"""

import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

KERNELS_AS_THEY_ARE = Path(__file__).parents[2] / "lfs_cli" / "kernels"
KERNELS = KERNELS_AS_THEY_ARE
"""Where kernels are loaded from; tests that break one name another folder, with that one in it."""

SHARED = ("hopper_buffers", "hopper_rope", "hopper_product")
"""What kernels import."""


class DeadlockError(AssertionError):
    """Every partition waits."""


class HazardError(AssertionError):
    """A read that the hardware may do too early or too late."""


class Value(np.ndarray):
    """A tensor or scalar in registers."""

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return np.asarray(array).view(Value)

    def __iadd__(self, other):  # registers are values: no other name of this one may change
        return self + other

    def to(self, dtype):
        return self.astype(dtype).view(Value)


def value(x: Any, dtype: Any = None) -> Value:
    return np.asarray(x, dtype).view(Value)


class Pointer:
    """A place, or an array of places, in global memory."""

    def __init__(self, array: np.ndarray, offset: Any = 0) -> None:
        self.array, self.offset = array.reshape(-1), offset

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.array, self.offset + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.array.dtype.type)


class Descriptor:
    """A tensor in global memory, as the copy engine sees it: in blocks, with bounds."""

    def __init__(self, array: np.ndarray, block: tuple[int, ...]) -> None:
        self.array, self.block_shape, self.dtype, self.layout = array, list(block), array.dtype.type, None
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)) * array.dtype.itemsize)

    def part(self, place: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The slices of the tensor and of the block that lie inside of the tensor."""
        inside, of_block = [], []
        for start, size, limit in zip(place, self.block_shape, self.array.shape, strict=True):
            stop = max(int(start), min(int(start) + size, limit))
            inside.append(slice(int(start), stop))
            of_block.append(slice(0, stop - int(start)))
        return tuple(inside), tuple(of_block)

    def read(self, place: Any) -> np.ndarray:
        block = np.zeros(self.block_shape, self.array.dtype)
        inside, of_block = self.part(place)
        block[of_block] = self.array[inside]
        return block


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, array: np.ndarray, unfenced: dict[tuple, set] | None = None, key: tuple = ()) -> None:
        self.array, self.dtype = array, array.dtype.type
        self.unfenced = {} if unfenced is None else unfenced
        self.key = key

    def _view(self, array: np.ndarray, key: tuple | None = None) -> "Shared":
        assert np.shares_memory(array, self.array)
        return Shared(array, self.unfenced, self.key if key is None else key)

    def index(self, i: Any) -> "Shared":
        return self._view(self.array[int(i)], (*self.key, int(i)))

    def slice(self, start: Any, length: Any, dim: int = 0) -> "Shared":
        cut = [slice(None)] * self.array.ndim
        cut[dim] = slice(int(start), int(start) + int(length))
        return self._view(self.array[tuple(cut)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self._view(self.array.transpose(order))

    def reshape(self, shape: Any) -> "Shared":
        return self._view(self.array.reshape(shape))

    def reinterpret(self, dtype: type, shape: Any, _layout: Any) -> "Shared":
        return self._view(self.array.reshape(-1).view(dtype)[: int(np.prod(shape))].reshape(shape))

    def store(self, x: Value) -> None:
        self.array[...] = x.astype(self.dtype)
        self.unfenced.setdefault(self.key, set()).add(threading.get_ident())

    def load(self, _layout: Any) -> Value:
        return value(self.array.copy())

    def fenced(self) -> np.ndarray:
        """The numbers, as the tensor cores and the copy engine read them."""
        if self.unfenced.get(self.key):
            raise HazardError("shared memory is read by another unit than the one that wrote it, without a fence")
        return self.array


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.phase = self.bytes = 0
        self.copies: list[Callable[[], int]] = []

    def arrive(self, count: int) -> None:
        self.pending -= count
        if self.pending < 0:
            raise HazardError("more arrivals than the barrier counts")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def land(self) -> None:
        """Let the copies that complete this barrier arrive."""
        while self.copies:
            self.bytes -= self.copies.pop(0)()
        self.settle()


class Barriers(list):
    index = list.__getitem__


class Product:
    """A product of a warpgroup that has been started."""

    def __init__(self, a: Any, b: Shared, sum_: Any, use_acc: bool) -> None:
        self.factors, self.sum, self.use_acc, self.result = (a, b), sum_, use_acc, None

    def __getattr__(self, name: str) -> Any:
        raise HazardError("a product is used before it was waited for")

    def run(self) -> None:
        a, b = (x.fenced() if isinstance(x, Shared) else x for x in self.factors)
        product = a.astype(np.float32) @ b.astype(np.float32)
        self.result = value(product + _finished(self.sum) if self.use_acc else product)


def _finished(x: Any) -> Value:
    if isinstance(x, Product):
        if x.result is None:
            raise HazardError("a product is used before it was waited for")
        return x.result
    return x


class Machine:
    """One program. Its partitions take turns: of those that need not wait, the first one runs, but `slowest` last.

    So the others are as far ahead of that one as the barriers let them be, which shows where a barrier is missing.
    """

    def __init__(self, slowest: int) -> None:
        self.condition = threading.Condition()
        self.slowest = slowest
        self.waiting: dict[int, Callable[[], bool]] = {}
        self.unfinished: list[int] = []
        self.running: int | None = None
        self.errors: list[BaseException] = []
        self.local = threading.local()
        self.buffers: list[Shared] = []

    def wait(self, is_done: Callable[[], bool]) -> None:
        with self.condition:
            me = self.local.partition
            self.waiting[me] = is_done
            self.pass_on()
            self.condition.wait_for(lambda: self.running == me or self.errors)
            del self.waiting[me]
            if self.running != me:
                raise DeadlockError("another partition failed")

    def pass_on(self) -> None:
        for partition in self.unfinished:
            if partition not in self.waiting or self.waiting[partition]():
                self.running = partition
                break
        else:
            self.running = None
            if self.unfinished:
                self.errors.append(DeadlockError("every partition waits for a barrier"))
        self.condition.notify_all()

    def queue(self, name: str) -> list:
        if not hasattr(self.local, name):
            setattr(self.local, name, [])
        return getattr(self.local, name)

    def specialize(self, partitions: Any, _warps: Any, _registers: Any) -> None:
        def work(me: int, function: Callable, arguments: tuple) -> None:
            self.local.partition = me
            with self.condition:
                self.condition.wait_for(lambda: self.running == me or self.errors)
            try:
                if not self.errors:
                    function(*arguments)
                    if self.queue("products") or self.queue("copies"):
                        raise HazardError("a partition ends before its products and copies do")
            except BaseException as error:  # whatever it is, the others must not wait for this thread
                self.errors.append(error)
            with self.condition:
                self.unfinished.remove(me)
                self.pass_on()

        self.unfinished = sorted(range(len(partitions)), key=lambda i: i == self.slowest)
        self.running = self.unfinished[0]
        threads = [threading.Thread(target=work, args=(i, *partition)) for i, partition in enumerate(partitions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def _load_kernels(name: str) -> ModuleType:
    broken = KERNELS / f"{name}.py"
    path = broken if broken.exists() else KERNELS_AS_THEY_ARE / broken.name
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Interpreter:
    """Load a kernel file and launch its kernels on numpy arrays."""

    def __init__(self, name: str, *, slowest: int = 0) -> None:
        self.slowest = slowest
        self.machine, self.program, self.programs = Machine(slowest), 0, 1
        with patch.dict(sys.modules, {"lfs_cli.kernels.gluon_compatibility": self._stand_in()}):
            for shared in SHARED:
                sys.modules[f"lfs_cli.kernels.{shared}"] = _load_kernels(shared)
            self.module = _load_kernels(name)

    def launch(self, kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
        for self.program in range(programs):
            self.programs, self.machine = programs, Machine(self.slowest)
            getattr(self.module, kernel)(*arguments, **constants)
            if self.machine.queue("loads") or self.machine.queue("groups"):
                raise HazardError("a program ends before its copies do")

    def _stand_in(self) -> ModuleType:
        module = ModuleType("gluon_compatibility")
        nothing = lambda *_, **__: None  # noqa: E731
        module.gluon = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
        module.aggregate = dataclass
        module.gl = SimpleNamespace(
            constexpr=lambda x: x,
            tensor=object,
            shared_memory_descriptor=object,
            float32=np.float32,
            int32=np.int32,
            int64=np.int64,
            NVMMADistributedLayout=nothing,
            DotOperandLayout=nothing,
            BlockedLayout=nothing,
            SliceLayout=nothing,
            SwizzledSharedLayout=nothing,
            static_range=range,
            num_warps=lambda: 4,
            program_id=lambda _: value(self.program),
            num_programs=lambda _: value(self.programs),
            cdiv=lambda a, b: -(-a // b),
            arange=lambda start, stop, _: value(np.arange(start, stop)),
            full=lambda shape, x, dtype, _: value(np.full(shape, x, dtype)),
            zeros=lambda shape, dtype, _: value(np.zeros(shape, dtype)),
            where=lambda c, a, b: value(np.where(c, a, b)),
            maximum=lambda a, b: value(np.maximum(a, b)),
            minimum=lambda a, b: value(np.minimum(a, b)),
            max=lambda x, axis: value(x.max(axis)),
            sum=lambda x, axis: value(x.sum(axis)),
            exp2=lambda x: value(np.exp2(x)),
            log2=lambda x: value(np.log2(x)),
            convert_layout=lambda x, _: x,
            reshape=lambda x, shape: x.reshape(shape).view(Value),
            split=lambda x: (x[..., 0].view(Value), x[..., 1].view(Value)),
            join=lambda a, b: value(np.stack([a, b], -1)),
            NVMMASharedLayout=SimpleNamespace(get_default_for=nothing),
            load=self._load,
            store=self._store,
            allocate_shared_memory=self._allocate,
            warp_specialize=lambda *arguments: self.machine.specialize(*arguments),
        )
        module.mbarrier = SimpleNamespace(
            MBarrierLayout=nothing, init=self._init, expect=self._expect, wait=self._wait, arrive=self._arrive
        )
        module.tma = SimpleNamespace(tensor_descriptor=object, store_wait=self._store_wait)
        module.load_tile, module.store_tile, module.add_tile = self._load_tile, self._store_tile, self._add_tile
        module.copy_async, module.commit_copies = self._copy_async, self._commit_copies
        module.wait_for_copies = self._wait_for_copies
        module.fence_async_shared = self._fence
        module.barrier = nothing  # partitions are threads here, not four warps that may drift apart
        module.reinterpret = Shared.reinterpret
        module.warpgroup_mma, module.warpgroup_mma_wait = self._multiply, self._multiply_wait
        module.warpgroup_mma_init = lambda x: x
        return module

    def _load(self, pointer: Pointer, mask: Any = True, other: Any = 0) -> Value:
        places, mask = np.broadcast_arrays(pointer.offset, mask)
        loaded = np.full(places.shape, other, pointer.array.dtype)
        loaded[mask] = pointer.array[places[mask]]
        return value(loaded)

    def _copy_async(self, buffer: Shared, pointer: Pointer, mask: Any = True) -> None:
        places, mask = np.broadcast_arrays(pointer.offset, mask)

        def copy() -> None:
            buffer.array[mask] = pointer.array[places[mask]]

        buffer.array[...] = np.nan
        self.machine.queue("loads").append(copy)

    def _commit_copies(self) -> None:
        loads = self.machine.queue("loads")
        self.machine.queue("groups").append(loads.copy())
        loads.clear()

    def _wait_for_copies(self, outstanding: int) -> None:
        groups = self.machine.queue("groups")
        while len(groups) > outstanding:
            for copy in groups.pop(0):
                copy()

    def _store(self, pointer: Pointer, x: Value, mask: Any = True) -> None:
        places, x, mask = np.broadcast_arrays(pointer.offset, x, mask)
        pointer.array[places[mask]] = x[mask]

    def _allocate(self, dtype: Any, shape: list[int], _layout: Any) -> Any:
        if dtype is np.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        buffer = Shared(np.full(shape, np.nan, dtype))
        self.machine.buffers.append(buffer)
        return buffer

    def _init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def _expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive(1)

    def _arrive(self, barrier: Barrier, count: int) -> None:
        barrier.arrive(count)
        self.machine.wait(lambda: True)  # those before this partition may go on now

    def _wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if not pred:
            return

        def is_done() -> bool:
            if barrier.phase % 2 == phase:
                barrier.land()
            return barrier.phase % 2 != phase

        if self.machine.unfinished:
            self.machine.wait(is_done)
        elif not is_done():  # a program without partitions
            raise DeadlockError("the program waits for a barrier that no one will complete")

    def _load_tile(self, descriptor: Descriptor, place: Any, barrier: Barrier, buffer: Shared) -> None:
        place = [int(x) for x in place]

        def copy() -> int:
            buffer.array[...] = descriptor.read(place)
            return descriptor.block_type.nbytes

        buffer.array[...] = np.nan
        barrier.copies.append(copy)

    def _store_tile(self, descriptor: Descriptor, place: Any, buffer: Shared) -> None:
        inside, of_block = descriptor.part(place)
        buffer.fenced()

        def copy() -> None:
            descriptor.array[inside] = buffer.fenced()[of_block]

        self.machine.queue("copies").append(copy)

    def _add_tile(self, descriptor: Descriptor, place: Any, buffer: Shared) -> None:
        inside, of_block = descriptor.part(place)
        buffer.fenced()

        def copy() -> None:
            descriptor.array[inside] += buffer.fenced()[of_block]

        self.machine.queue("copies").append(copy)

    def _store_wait(self, outstanding: int) -> None:
        copies = self.machine.queue("copies")
        while len(copies) > outstanding:
            copies.pop(0)()

    def _fence(self) -> None:
        for buffer in self.machine.buffers:
            for writers in list(buffer.unfenced.values()):
                writers.discard(threading.get_ident())

    def _multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        for factor in (a, b):
            if isinstance(factor, Shared):
                factor.fenced()
        product = Product(a, b, acc, use_acc)
        self.machine.queue("products").append(product)
        return product

    def _multiply_wait(self, outstanding: int, deps: list[Any]) -> Any:
        products = self.machine.queue("products")
        while len(products) > outstanding:
            products.pop(0).run()
        results = tuple(_finished(x) for x in deps)
        return results[0] if len(results) == 1 else results
