"""The loader: what it accepts, what it says of the rest, and that what it saves loads back as itself."""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfs_cli.config import (
    BenchConfig,
    DownloadConfig,
    GenerateConfig,
    ModelConfig,
    ReportConfig,
    Settings,
    TokenizeConfig,
    TrainConfig,
    dump_config,
    explain,
    find_config,
    json_schema,
    load_config,
)
from lfs_cli.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMAS = [TrainConfig, DownloadConfig, TokenizeConfig, GenerateConfig, ReportConfig]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(TrainConfig, path).name


def test_the_default_config_is_the_base_model_of_cs336() -> None:
    config = load_config(TrainConfig, "config.json")
    assert (config.model.vocab_size, config.model.context_length, config.model.width) == (10_000, 256, 512)
    assert (config.model.feed_forward_width, config.model.layers, config.model.heads) == (1344, 4, 16)
    assert config.total_tokens == 327_680_000


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_a_saved_config_loads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, path, ["optimizer.0.options.weight_decay=1e-7", "plugins=[]"])
    saved = tmp_path / "config.json"
    saved.write_text(dump_config(config))
    assert load_config(TrainConfig, saved) == config


@given(
    heads=st.integers(1, 8),
    head_dim=st.integers(1, 32).map(lambda n: 2 * n),
    layers=st.integers(1, 5),
    z_loss=st.floats(0, 10),
    lr=st.floats(0, 10),
    warmup=st.floats(0, 1),
)
def test_any_config_survives_saving(
    heads: int, head_dim: int, layers: int, z_loss: float, lr: float, warmup: float
) -> None:
    overrides = [
        f"model.heads={heads}",
        f"model.width={heads * head_dim}",
        f"model.layers={layers}",
        f"model.z_loss={z_loss!r}",
        f"optimizer.0.lr={lr!r}",
        f"schedule.warmup={warmup!r}",
    ]
    config = load_config(TrainConfig, None, overrides)
    assert TrainConfig.model_validate_json(dump_config(config), strict=True) == config
    assert (config.model.head_dim, config.model.kv_heads) == (head_dim, heads)


def test_defaults_then_file_then_options_then_set(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"steps": 1, "batch_size": 2, "seed": 3}')
    config = load_config(TrainConfig, path, ["seed=5", "seed=6"], {"batch_size": 4, "seed": 4, "clip": None})
    assert (config.steps, config.batch_size, config.seed, config.clip) == (1, 4, 6, 1.0)


def test_numbers_in_a_path_index_lists() -> None:
    config = load_config(TrainConfig, "config_std_sgd.json", ["optimizer.0.lr=0.25"])
    assert [(group.name, group.lr, group.options) for group in config.optimizer] == [("sgd", 0.25, {"momentum": 0.9})]


def test_a_path_into_a_default_list_starts_from_the_default() -> None:
    config = load_config(TrainConfig, None, ["optimizer.0.options.betas=[0.8, 0.9]"])
    assert config.optimizer[0].options == {"betas": [0.8, 0.9]}


def test_bare_words_are_texts_and_integers_become_floats() -> None:
    config = load_config(TrainConfig, None, ["name=first try", "optimizer.0.lr=1"])
    assert (config.name, config.optimizer[0].lr) == ("first try", 1.0)


def test_derived_defaults_follow_what_they_derive_from() -> None:
    swiglu = load_config(ModelConfig, None, ["width=384", "heads=6"])
    silu = load_config(ModelConfig, None, ["width=384", "heads=6", "feed_forward=silu"])
    assert (swiglu.kv_heads, swiglu.feed_forward_width, silu.feed_forward_width) == (6, 1024, 1536)


REFUSED = [
    ("model.layer=3", "unknown key `model.layer`", "did you mean `model.layers`?"),
    ("stepz=3", "unknown key `stepz`", "did you mean `steps`?"),
    ("optimizer.0.nam=sgd", "unknown key `optimizer.0.nam`", "did you mean `optimizer.0.name`?"),
    ("optimizer.1.lr=1", "`optimizer.1` does not exist: `optimizer` has 1 entry", "use `optimizer.0`"),
    ("optimizer.0.name=adam", "unknown optimizer `adam`", "did you mean `adamw`?"),
    ("optimizer.0.options.beta=1", "optimizer `adamw` has no option `beta`", "did you mean `betas`?"),
    ("schedule.name=cosin", "unknown schedule `cosin`", "did you mean `cosine`?"),
    ("model.attention=flesh", "unknown attention backend `flesh`", "did you mean `flash`?"),
    ("model.norm=rmsnorm", "unknown norm `rmsnorm`", "did you mean `rms_norm`?"),
    ("model.feed_forward=swigul", "unknown feed-forward `swigul`", "did you mean `swiglu`?"),
    ("model.norm_position=prae", '`model.norm_position` cannot be "prae"', "choose one of: pre, post"),
    ("device=gpu", '`device` cannot be "gpu"', "choose one of: auto, cpu, cuda, mps"),
    ("model.layers=four", '`model.layers` must be a whole number, not `"four"`', "the default is `4`"),
    ("model.layers=2.5", "`model.layers` must be a whole number, not `2.5`", "the default is `4`"),
    ("steps=true", "`steps` must be a whole number, not `true`", "the default is `1000`"),
    (
        "compile=1",
        '`compile` must be `true` or `false`, or `"auto"`, or `"blocks"`, not `1`',
        'the default is `"auto"`',
    ),
    (
        "compile=atuo",
        '`compile` must be `true` or `false`, or `"auto"`, or `"blocks"`, not `"atuo"`',
        'the default is `"auto"`',
    ),
    ("clip=-1", "`clip` must be at least 0, not `-1`", "the default is `1.0`"),
    ("model.z_loss=-1e-4", "`model.z_loss` must be at least 0, not `-0.0001`", "the default is `0.0`"),
    ("model.z_loss=1e999", "`model.z_loss` must be a finite number, not `Infinity`", "the default is `0.0`"),
    ("model.z_los=1", "unknown key `model.z_los`", "did you mean `model.z_loss`?"),
    ("clip=NaN", "`clip` must be a finite number, not `NaN`", "the default is `1.0`"),
    ("steps=0", "`steps` must be at least 1, not `0`", "the default is `1000`"),
    ("optimizer=[]", "`optimizer` must have at least 1 entry, not `[]`", None),
    ("model.context_length=1", "`model.context_length` must be at least 2, not `1`", "the default is `256`"),
    (
        "model.heads=5",
        "`model.width` (512) is not a multiple of `model.heads` (5)",
        "set `model.width` to 520",
    ),
    (
        "model.kv_heads=3",
        "`model.heads` (16) is not a multiple of `model.kv_heads` (3)",
        "set `model.kv_heads` to 2",
    ),
    (
        "model.vocab_size=256",
        "`model.vocab_size` (256) has no room for 256 bytes and 1 special token",
        "set `model.vocab_size` to at least 257",
    ),
    (
        "model.value_embeddings=3",
        "`model.value_embeddings` (3) are used twice each, and `model.layers` is 4",
        "set `model.value_embeddings` to 2",
    ),
    (
        "model.window_pattern=SX",
        "`model.window_pattern` (`SX`) must be written with `S` and `L` alone",
        "`--set model.window_pattern=SSSL` gives three layers of four the window",
    ),
    (
        'schedule.options={"decay": 0.5}',
        "schedule `cosine` has no option `decay`",
        "remove `decay`: nothing can be set here",
    ),
    ("microbatch=big", '`microbatch` must be a whole number, or `"auto"`, not `"big"`', "the default is `null`"),
    ("microbatch=5", "`batch_size` (64) is not a multiple of `microbatch` (5)", "set `microbatch` to 4"),
    ("steps.x=1", "`steps` is a single value, so `steps.x` does not exist", "set `steps` itself"),
    ("steps", "`--set steps` is not a setting", "write it as `--set name=value`"),
]


@pytest.mark.parametrize(("override", "message", "hint"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_mistake_is_named_and_answered(override: str, message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, None, [override])
    assert str(caught.value) == message
    assert hint is None or caught.value.hint == hint


FILES = [
    ('{"steps": 1,}', "is not JSON: line 1"),
    ("", "is not JSON: line 1"),
    ("[1, 2]", "does not hold a JSON object"),
    ('{"steps": 1, "steps": 2}', "`steps` is set twice"),
    ("[" * 100_000, "is nested too deeply"),
    (b"\xff\xfe\x00", "is not UTF-8 text"),
    ('{"model": {"layer": 1}}', "unknown key `model.layer`"),
    ('{"model": 3}', "`model` must be an object, not `3`"),
    ('{"optimizer": {"name": "sgd"}}', "`optimizer` must be a list"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[row[1] for row in FILES])
def test_a_file_that_cannot_be_used_is_named(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path)
    assert message in str(caught.value)
    assert caught.value.hint


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_a_config_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        path.write_bytes(content)
        with suppress(ConfigError):  # anything else fails the test
            load_config(TrainConfig, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from([name for name, _, _ in explain(TrainConfig)] + ["model", "optimizer", "data"]), value=JSON)
def test_no_value_raises_anything_but_a_config_error(name: str, value: object) -> None:
    with suppress(ConfigError):  # anything else fails the test
        load_config(TrainConfig, None, [f"{name}={json.dumps(value)}"])


def test_a_config_is_found_as_given_then_in_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart.json") == CONFIGS / "quickstart.json"
    assert find_config("quickstart") == CONFIGS / "quickstart.json"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.json").write_text("{}")
    assert find_config("quickstart.json") == Path("configs/quickstart.json")
    (tmp_path / "quickstart.json").write_text("{}")
    assert find_config("quickstart.json") == Path("quickstart.json")
    with pytest.raises(ConfigError) as caught:
        find_config("quikstart.json")
    assert caught.value.hint == "did you mean `quickstart.json`?"


@pytest.mark.parametrize("schema", [*SCHEMAS, BenchConfig], ids=lambda schema: schema.__name__)
def test_every_setting_is_explained(schema: type[Settings]) -> None:
    rows = list(explain(schema))
    assert all(text.endswith((".", "`")) for _, _, text in rows), [name for name, _, text in rows if not text]
    assert len({name for name, _, _ in rows}) == len(rows)
    assert json_schema(schema)["additionalProperties"] is False


def test_a_config_is_frozen() -> None:
    config = load_config(TrainConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 2


def test_a_plugin_may_bring_names_that_only_its_import_reveals() -> None:
    config = load_config(TrainConfig, None, ['plugins=["my_module"]', "optimizer.0.name=mine"])
    assert config.optimizer[0].name == "mine"


def test_the_loader_imports_no_torch() -> None:
    script = (
        "import sys; from lfs_cli.config import TrainConfig, load_config; load_config(TrainConfig, 'config.json');"
        "print({'torch', 'numpy', 'numba', 'rich'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown == "set()\n"
