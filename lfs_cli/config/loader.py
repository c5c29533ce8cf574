"""One door for six commands: defaults, then a JSON file, then options, then `--set`, from left to right.

Values of `--set` are JSON, and bare words are strings. Numbers in a path index lists: `optimizer.0.lr=0.01`. Nothing is
coerced but int to float. Every mistake becomes a `ConfigError` with the dotted name of the setting.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lfs_cli.config.schema import Settings
from lfs_cli.errors import ConfigError, did_you_mean

S = TypeVar("S", bound=Settings)


def load_config(
    schema: type[S],
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> S:
    """Return an instance of ``schema`` built from a JSON file, options and dotted overrides.

    Args:
        schema: A model of `lfs_cli.config.schema`.
        path: JSON file holding one object (see `find_config`), or None for the defaults.
        overrides: Items such as ``"model.layers=6"``. Values are JSON; bare words are strings.
        options: Dotted names with values, as short options of the command line give them; None means not given.

    Raises:
        ConfigError: For a missing file, bad JSON, an unknown key, a wrong type or a combination that cannot work.
    """
    tree = _read(find_config(path)) if path is not None else {}
    for name, value in (options or {}).items():
        if value is not None:
            _set(schema, tree, name, value)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"`--set {override}` is not a setting", hint="write it as `--set name=value`")
        _set(schema, tree, name, _value(text))
    _check_keys(schema, tree)
    try:
        return schema.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise _explain_rejection(schema, error) from None


def find_config(path: Path | str) -> Path:
    """Return the config file that ``path`` names: as given, else in `configs/` here, else among those of lfs."""
    path = Path(path)
    package = Path(__file__).resolve().parents[1]
    folders = [Path("configs"), package.parent / "configs", package / "configs"]
    candidates = [path, *(folder / path for folder in folders), *(folder / f"{path}.json" for folder in folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = {file.name for folder in folders if folder.is_dir() for file in folder.glob("*.json")}
    raise ConfigError(f"no config `{path}` here or in `configs/`", hint=did_you_mean(path.name, shipped))


def dump_config(config: Settings) -> str:
    """Return ``config`` as JSON that `load_config` reads back as an equal object."""
    return config.model_dump_json(indent=2) + "\n"


def json_schema(schema: type[Settings]) -> dict[str, Any]:
    """Return the JSON Schema of ``schema``, with which an editor completes and checks a config."""
    return schema.model_json_schema()


def explain(schema: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the dotted name, default and meaning of every setting, in the order of the schema."""
    for name, field in schema.model_fields.items():
        inner = _model_in(field)
        if inner and inner is field.annotation:
            yield from explain(inner, f"{prefix}{name}.")
        elif inner:
            yield from explain(inner, f"{prefix}{name}.0.")
        else:
            yield f"{prefix}{name}", _default_text(field), field.description or ""


def _default_text(field: FieldInfo) -> str:
    if field.default_factory is not None and field.default_factory is not dict:
        return "derived"
    return json.dumps(TypeAdapter(Any).dump_python(field.get_default(call_default_factory=True), mode="json"))


def _read(path: Path) -> dict[str, Any]:
    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"`{name}` is set twice in {path}", hint="keep one of the two")
        return dict(pairs)

    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=refuse_twice)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="check the file's permissions") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8 JSON") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            hint='write one object, such as `{"steps": 100}`; JSON has no comments and no trailing commas',
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", hint="write one object of settings") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} does not hold a JSON object", hint='write one, such as `{"steps": 100}`')
    return tree


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text


def _model_in(field: FieldInfo) -> type[Settings] | None:
    """Return the settings model that ``field`` holds, alone or in a tuple."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Settings):
            return kind
    return None


def _set(schema: type[Settings], tree: dict[str, Any], name: str, value: Any) -> None:
    """Put ``value`` at the dotted ``name`` of ``tree``, creating what is on the way from the schema's defaults."""
    place: Any = tree
    inside: type[Settings] | None = schema
    parts = name.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[: depth + 1])
        last = depth == len(parts) - 1
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise ConfigError(
                    f"`{where}` does not exist: `{'.'.join(parts[:depth])}` has {len(place)} entries",
                    hint=f"use a number from 0 to {len(place) - 1}",
                )
            key: Any = int(part)
        elif isinstance(place, dict):
            key = part
            if inside is not None:
                if part not in inside.model_fields:
                    raise _unknown(inside, ".".join(parts[:depth]), part)
                field = inside.model_fields[part]
                inside = _model_in(field)
                if part not in place and not last:
                    place[part] = _default_tree(field)
        else:
            raise ConfigError(
                f"`{'.'.join(parts[:depth])}` is a single value, so `{where}` does not exist",
                hint=f"set `{'.'.join(parts[:depth])}` itself",
            )
        if last:
            place[key] = value
        else:
            place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]


def _default_tree(field: FieldInfo) -> Any:
    """Return the default of ``field`` as JSON: complete for a list, empty for a model, whose defaults fill it."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
        return {}
    default = field.get_default(call_default_factory=True, validated_data={})
    return TypeAdapter(Any).dump_python(default, mode="json", exclude_unset=True)


def _check_keys(schema: type[Settings], tree: Any, where: str = "") -> None:
    """Raise ConfigError for the first key of ``tree`` that ``schema`` does not have, at any depth."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key not in schema.model_fields:
            raise _unknown(schema, where, key)
        inner = _model_in(schema.model_fields[key])
        dotted = f"{where}.{key}" if where else key
        if inner and isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(inner, item, f"{dotted}.{index}")
        elif inner:
            _check_keys(inner, value, dotted)


def _unknown(schema: type[Settings], where: str, key: str) -> ConfigError:
    prefix = f"{where}." if where else ""
    known = [f"{prefix}{name}" for name in schema.model_fields]
    return ConfigError(f"unknown key `{prefix}{key}`", hint=did_you_mean(f"{prefix}{key}", known))


_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "`true` or `false`", NoneType: "`null`"}


def _explain_rejection(schema: type[Settings], error: ValidationError) -> ConfigError:
    """Turn pydantic's first complaint into our own words."""
    first = error.errors()[0]
    steps = [str(step) for step in first["loc"] if not str(step).startswith(("constrained-", "function-"))]
    while steps and steps[-1] in {"int", "float", "str", "bool", "none"}:  # pydantic names the branch of a union
        steps.pop()
    name = ".".join(steps)
    given = json.dumps(first["input"], default=str)
    wanted = {
        "int_type": "be a whole number",
        "int_from_float": "be a whole number",
        "float_type": "be a number",
        "string_type": "be a text in quotes",
        "bool_type": "be `true` or `false`",
        "tuple_type": "be a list",
        "dict_type": "be an object",
        "finite_number": "be a finite number",
        "model_type": "be an object",
        "model_attributes_type": "be an object",
    }.get(first["type"])
    limits: dict[str, Any] = first.get("ctx", {})
    if first["type"] == "greater_than_equal":
        wanted = f"be at least {limits['ge']:g}"
    elif first["type"] == "less_than_equal":
        wanted = f"be at most {limits['le']:g}"
    elif first["type"] == "greater_than":
        wanted = f"be more than {limits['gt']:g}"
    elif first["type"] == "too_short":
        wanted = f"have at least {limits['min_length']} entry"
    elif first["type"] == "literal_error":
        choices = str(limits["expected"]).replace("'", "").replace(" or ", ", ")
        return ConfigError(f"`{name}` cannot be {given}", hint=f"choose one of: {choices}")
    field = _field_at(schema, steps)
    example = _default_text(field) if field is not None else "derived"
    hint = f"the default is `{example}`" if example != "derived" else f"see `{name}` in `lfs train --explain`"
    return ConfigError(f"`{name}` must {wanted or first['msg'].lower()}, not `{given}`", hint=hint)


def _field_at(schema: type[Settings], steps: Sequence[str]) -> FieldInfo | None:
    inside: type[Settings] | None = schema
    field = None
    for step in steps:
        if step.isdecimal():
            continue
        if inside is None or step not in inside.model_fields:
            return None
        field = inside.model_fields[step]
        inside = _model_in(field)
    return field
