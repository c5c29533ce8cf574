"""The rules of the house: imports point down, the light parts stay light, the top level holds what it should."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lfs_cli as lfs

ROOT = Path(lfs.__file__).parent
FOUNDATION = {"errors", "files", "memory", "registry", "config"}
CORE = {
    "kernels",
    "tokenizer",
    "corpus",
    "model",
    "optimizers",
    "training",
    "generation",
    "benchmarks",
    "reports",
}
ALLOWED = {
    "errors": set(),
    "files": set(),
    "memory": set(),
    "registry": {"errors"},
    "config": {"errors", "files", "registry"},
    "kernels": set(),
    "tokenizer": {"errors", "files"},
    "corpus": {"errors", "files", "registry"},
    "optimizers": {"errors", "registry", "config", "kernels"},
    "model": {"errors", "files", "registry", "config", "kernels"},
    "training": {"errors", "files", "config", "corpus", "model", "optimizers"},
    "generation": {"errors", "files", "registry", "config", "model", "tokenizer"},
    "benchmarks": FOUNDATION | CORE,
    "reports": {"errors", "files"},
    "runs": FOUNDATION | CORE,
    "cli": {"errors", "config", "runs"},
}
HEAVY = {"torch", "numpy", "numba", "triton", "huggingface_hub", "safetensors", "regex"}


def imported_by(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return set(names)


def files_of(room: str) -> list[Path]:
    return sorted(ROOT.glob(f"{room}.py")) + sorted((ROOT / room).glob("**/*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_down(room: str) -> None:
    assert files_of(room)
    for file in files_of(room):
        rooms = {name.split(".")[1] for name in imported_by(file) if name.startswith("lfs_cli.")} - {"__version__"}
        extra = rooms - ALLOWED[room] - {room}
        assert not extra, f"{file.relative_to(ROOT)} may not import {sorted(extra)}"


def test_every_room_has_its_rule() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} == set(ALLOWED)


@pytest.mark.parametrize("room", ["tokenizer", "reports", "config"])
def test_rooms_that_need_no_torch_do_not_import_it(room: str) -> None:
    for file in files_of(room):
        assert not {name for name in imported_by(file) if name.split(".")[0] == "torch"}, file


def test_only_the_command_line_prints() -> None:
    for file in ROOT.glob("**/*.py"):
        if file.parent.name == "cli":
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], file


def test_nothing_borrows_what_lfs_writes_itself() -> None:
    banned = (
        "F.scaled_dot_product_attention",
        "functional.scaled_dot_product_attention",
        "F.cross_entropy",
        "nn.Linear",
        "nn.Embedding",
        "nn.RMSNorm",
        "nn.LayerNorm",
        "torch.optim.AdamW",
        "torch.optim.SGD",
        "import tiktoken",
        "from tokenizers",
        "import transformers",
        "clip_grad_norm_",
        "pickle",
    )
    for file in ROOT.glob("**/*.py"):
        if file.parent.name == "benchmarks":  # baselines live there
            continue
        code = ast.unparse(_without_docstrings(ast.parse(file.read_text(encoding="utf-8"))))
        found = [name for name in banned if name in code] + re.findall(
            r"(?<!safetensors\.)torch\.(?:load|save)\(", code
        )
        assert not found, f"{file.relative_to(ROOT)} uses {found}"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return tree


def test_every_module_says_what_is_in_it() -> None:
    for file in ROOT.glob("**/*.py"):
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), file


def test_every_public_name_can_be_imported() -> None:
    for name in lfs.__all__:
        assert getattr(lfs, name) is not None
    assert set(lfs.__all__) == set(lfs._HOMES)
    assert set(lfs.__all__) <= set(dir(lfs))


def run_python(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_importing_lfs_imports_nothing() -> None:
    assert run_python("import sys, lfs_cli; print([m for m in sys.modules if m.startswith('lfs_cli.')])") == "[]\n"


def test_optimizers_do_without_the_compiler_of_torch() -> None:
    assert run_python("import sys, lfs_cli.optimizers; print('torch._dynamo' in sys.modules)") == "False\n"


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom lfs_cli.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: print('MODULES', *sys.modules)"
    )
    assert not HEAVY & set(run_python(script).split("MODULES")[1].split())


def test_a_typo_in_a_config_is_answered_before_torch_is_imported() -> None:
    script = (
        "import sys\nfrom lfs_cli.cli.app import app\n"
        "try: app(['train', 'quickstart.json', '--set', 'model.layer=3'])\n"
        "except SystemExit as end: print(end.code, 'MODULES', *sys.modules)"
    )
    code, modules = run_python(script).split("MODULES")
    assert code.strip() == "2"
    assert not HEAVY & set(modules.split())


def test_lfs_works_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import lfs_cli as lfs, torch\n"
        "for name in lfs.__all__: getattr(lfs, name)\n"
        "config = lfs.ModelConfig(vocab_size=300, context_length=8, width=16, layers=1, heads=2)\n"
        "print(lfs.Transformer(config)(torch.zeros(1, 4, dtype=torch.long)).shape)"
    )
    assert run_python(script) == "torch.Size([1, 4, 300])\n"


def test_the_top_level_holds_what_it_should() -> None:
    if not (ROOT.parent / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT.parent, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in listed.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        "LICENSE",
        "README.md",
        "configs",
        "data",
        "lfs_cli",
        "pyproject.toml",
        "tests",
    }
