"""Registries: a name finds its entry, a slip finds the nearest name, and reading sources finds what importing finds."""

import sys
from pathlib import Path

import pytest

from lfs_cli.errors import ConfigError, did_you_mean
from lfs_cli.registry import Registry, catalogue
from lfs_cli.runs.plugins import import_plugins

ROOMS = [
    ("lfs_cli.optimizers", "OPTIMIZERS"),
    ("lfs_cli.optimizers", "SCHEDULES"),
    ("lfs_cli.model", "ATTENTION"),
    ("lfs_cli.model", "NORMS"),
    ("lfs_cli.model", "FEED_FORWARDS"),
    ("lfs_cli.generation", "SAMPLERS"),
    ("lfs_cli.benchmarks", "BENCHMARKS"),
]


def test_a_registered_name_finds_its_entry() -> None:
    registry: Registry = Registry("animal", "lfs_cli.optimizers")
    registry._discovered = True

    @registry.register("dog")
    def bark(*, times: int = 1) -> str:
        return "woof" * times

    assert registry.names() == ["dog"]
    assert registry.get("dog") is bark
    assert registry.create("dog", times=2) == "woofwoof"
    with pytest.raises(ConfigError) as caught:
        registry.get("dgo")
    assert (str(caught.value), caught.value.hint) == ("unknown animal `dgo`", "did you mean `dog`?")
    with pytest.raises(ConfigError) as caught:
        registry.create("dog", time=2)
    assert (str(caught.value), caught.value.hint) == ("animal `dog` has no option `time`", "did you mean `times`?")
    with pytest.raises(ValueError, match="already registered"):
        registry.register("dog")(bark)


@pytest.mark.parametrize(("room", "table"), ROOMS, ids=[table for _, table in ROOMS])
def test_reading_the_sources_finds_what_importing_finds(room: str, table: str) -> None:
    from importlib import import_module

    registry = getattr(import_module(room), table)
    assert sorted(catalogue(room, table)) == registry.names() != []


def test_the_catalogue_knows_the_options() -> None:
    assert {"lr", "betas", "eps", "weight_decay"} <= set(catalogue("lfs_cli.optimizers", "OPTIMIZERS")["adamw"])


def test_the_catalogue_knows_what_was_registered_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from lfs_cli.optimizers import OPTIMIZERS

    monkeypatch.setattr(OPTIMIZERS, "_entries", dict(OPTIMIZERS._entries))

    @OPTIMIZERS.register("mine")
    def mine(params: list, lr: float = 1.0, *, decay: float = 0.0, **others: float) -> None: ...

    assert catalogue("lfs_cli.optimizers", "OPTIMIZERS")["mine"] == ("params", "lr", "decay")


FAILING = {
    "x = 1\nraise RuntimeError('hm')": ("RuntimeError: hm ({path}, line 2)", "see where with `python -m {name}`"),
    "import sys; sys.exit(3)": ("SystemExit: 3 ({path}, line 1)", "see where with `python -m {name}`"),
    "def (": ("SyntaxError: ", "see where with `python -m {name}`"),
    "from lfs_cli.optimizers import NOPE": ("ImportError: ", "see where with `python -m {name}`"),
    "\nimport nope": ("No module named 'nope' ({path}, line 2)", "install what has `nope`, or leave its import out"),
}


@pytest.mark.parametrize("source", FAILING)
def test_a_plugin_that_fails_is_named(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message, hint = (text.format(path=tmp_path / "broken_plugin.py", name="broken_plugin") for text in FAILING[source])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_plugin.py").write_text(source)
    with pytest.raises(ConfigError, match="plugin `broken_plugin` cannot be imported: ") as caught:
        import_plugins(["broken_plugin"])
    assert message in str(caught.value)
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("plugins/mine.py", "name the module and not its file: `plugins.mine`"),
        ("/plugins/mine.py", "name a module of the current folder or of the Python path"),
        ("", "name a module of the current folder or of the Python path"),
    ],
)
def test_what_names_no_plugin_is_answered(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported: ") as caught:
        import_plugins([name])
    assert caught.value.hint == hint


def test_a_hint_names_the_nearest_choice_or_all() -> None:
    assert did_you_mean("adam", ["sgd", "adamw"]) == "did you mean `adamw`?"
    assert did_you_mean("zzz", ["sgd", "adamw"]) == "choose one of: adamw, sgd"
