"""Machine code of the loops: made by numba once on a machine, kept in a file, loaded without numba after that.

numba takes half a second to start and some seconds to compile a loop. Loading what it made takes milliseconds: the
object code goes to LLVM's linker, which llvmlite offers, and is called through ctypes, which lets other threads run
meanwhile. So each loop of `LOOPS` takes and returns one 64-bit number and calls nothing outside of itself.

A file's name holds a hash of all that the code depends on: the sources of the loops, the versions of numba and
llvmlite, the processor and its features. Its content is checked before it is used; one that is damaged, or that
another user could have written, is made again. The last few versions of each loop are kept. Where no folder can be
written, each process compiles for itself.
"""

import ctypes
import hashlib
import logging
import os
import sys
import threading
import time
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lfs_cli.files import replace_bytes

log = logging.getLogger(__name__)

LOOPS = {
    "scan_gpt2": "loops_scan",
    "scan_cl100k": "loops_scan",
    "scan_o200k": "loops_scan",
    "find_pairs": "loops_scan",
    "encode_texts": "loops_encode",
    "add_words": "loops_encode",
    "fill_pairs": "loops_encode",
    "move_words": "loops_encode",
    "count_words": "loops_learn",
    "add_counts": "loops_learn",
    "list_words": "loops_learn",
    "spell_words": "loops_learn",
    "fill_pair_slots": "loops_learn",
    "make_merges": "loops_learn",
}
"""Loop -> the file that it is in."""

TASKS = {
    "encoding": ("find_pairs", "encode_texts", "add_words", "fill_pairs", "move_words"),
    "learning": (
        "find_pairs", "count_words", "add_counts", "list_words", "move_words",
        "spell_words", "fill_pair_slots", "make_merges",
    ),
}  # fmt: skip
"""Task -> the loops that it needs besides a scanner."""

KEPT_VERSIONS = 4
"""Files of one loop that are kept: of several environments, or of sources before and after a change."""

_SOURCES = (
    "machine_code", "vectors", "desk", "unicode_classes", "loops_scan", "loops_words", "loops_encode", "loops_learn",
)  # fmt: skip

_Function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
"""How numba's functions are called: where the result goes, where an error goes, then the arguments."""


class Loop:
    """A compiled loop, called with the address of its desk.

    Args:
        at: Address of its machine code.
    """

    def __init__(self, at: int) -> None:
        self.address = at
        self._function = _Function(at)

    def __call__(self, desk: int) -> int:
        """Run it, without the interpreter's lock, and return what it returns."""
        result, error = ctypes.c_int64(), ctypes.c_void_p()
        self._function(ctypes.addressof(result), ctypes.addressof(error), desk)
        return result.value


_loading = threading.RLock()
_loaded: dict[str, Loop] = {}
_linked: list[Any] = []  # what the addresses of the code depend on


def load(name: str) -> Loop:
    """Return a loop, compiling it when this machine has not done so before."""
    with _loading:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def _load(name: str) -> Loop:
    kept = _path(name)
    code = _read(kept)
    if code is not None:
        try:
            return _link(*code)
        except Exception as error:
            log.info("cannot use %s: %s", kept, error)
    return _compile(name, kept)


def is_ready(task: str, scanner: str | None) -> bool:
    """Return whether the loops of a task, and a scanner if it needs one, can be loaded without compiling.

    Args:
        task: A key of `TASKS`.
        scanner: A loop, or None.
    """
    names = TASKS[task] if scanner is None else (*TASKS[task], scanner)
    return all(name in _loaded or _path(name).exists() for name in names)


def announce(task: str, scanner: str | None) -> None:
    """Log that the loops of a task are going to be compiled, if they are."""
    if not is_ready(task, scanner):
        log.info("compiling the loops for %s; later runs find them in %s", task, folder())


def folder() -> Path:
    """Return where machine code is kept."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "lfs" / "loops"


def _path(name: str) -> Path:
    return folder() / f"{name}-{_key()}.o"


@cache
def _key() -> str:
    """Return a hash of all that the machine code depends on."""
    import llvmlite.binding as llvm

    parts: list[str] = [version("numba"), version("llvmlite"), llvm.get_process_triple(), llvm.get_host_cpu_name()]
    parts.append(llvm.get_host_cpu_features().flatten())
    parts += [(Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in _SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(name: str, path: Path) -> Loop:
    """Compile a loop, keep it if possible, and return it."""
    started = time.perf_counter()
    numba, vectors = import_module("numba"), import_module("lfs_cli.tokenizer.vectors")
    function = getattr(import_module(f"lfs_cli.tokenizer.{LOOPS[name]}"), name)
    compiled = numba.njit("int64(int64)", **vectors.OPTIONS)(function)
    ((signature, result),) = compiled.overloads.items()
    symbol = result.fndesc.llvm_func_name
    try:
        import llvmlite.binding as llvm

        module = llvm.parse_assembly(compiled.inspect_llvm(signature))
        needed = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
        if needed:  # LLVM would end the process that cannot find them
            raise RuntimeError(f"it calls {', '.join(sorted(needed))}")
        code = _target_machine().emit_object(module)
        loop = _link(symbol, code)
        _write(path, symbol, code)
    except Exception as error:  # it is compiled: whatever is wrong with keeping it must not matter
        log.info("cannot keep the machine code of %s: %s", name, error)
        loop = Loop(result.library.get_pointer_to_function(symbol))
        _linked.append(compiled)
    log.info("compiled %s in %.1f seconds", name, time.perf_counter() - started)
    return loop


def _read(path: Path) -> tuple[str, bytes] | None:
    """Return the name and the object code in a file, None when it is missing, damaged or not surely this user's."""
    try:
        with path.open("rb") as file:
            if not _is_own(os.fstat(file.fileno())):
                return None
            content = file.read()
    except OSError:
        return None
    digest, rest = content[:32], content[32:]
    symbol, separator, code = rest.partition(b"\0")
    if not separator or hashlib.sha256(rest).digest() != digest:
        return None
    return symbol.decode(), code


def _is_own(status: os.stat_result) -> bool:
    """Whether nobody but this user, or the superuser, can have written a file. Its content is going to be run."""
    if sys.platform == "win32":  # the folder belongs to the user's profile
        return True
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _write(path: Path, symbol: str, code: bytes) -> None:
    rest = symbol.encode() + b"\0" + code
    try:
        replace_bytes(path, hashlib.sha256(rest).digest() + rest)
        path.chmod(0o600)
        versions = sorted(
            path.parent.glob(f"{path.name.rpartition('-')[0]}-*.o"), key=lambda file: file.stat().st_mtime
        )
        for old in versions[:-KEPT_VERSIONS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.info("cannot keep machine code in %s: %s", path.parent, error)


@cache
def _target_machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static",
        codemodel="jitdefault",
        jit=True,
    )


@cache
def _engine() -> Any:
    """Return LLVM's linker for code in memory."""
    import llvmlite.binding as llvm

    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())


def _link(symbol: str, code: bytes) -> Loop:
    """Return the function called ``symbol`` of object code."""
    import llvmlite.binding as llvm

    engine = _engine()
    part = llvm.ObjectFileRef.from_data(code)
    engine.add_object_file(part)
    engine.finalize_object()
    at = engine.get_function_address(symbol)
    if not at:
        raise RuntimeError(f"no function {symbol}")
    _linked.append(part)
    return Loop(at)
