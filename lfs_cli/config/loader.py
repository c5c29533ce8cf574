"""One door for six commands: defaults, then a JSON file, then options, then `--set`, from left to right.

Values of `--set` are JSON, and bare words are strings. Numbers in a path index lists: `optimizer.0.lr=0.01`. Nothing is
coerced but int to float. Every mistake becomes a `ConfigError` with the dotted name of the setting.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lfs_cli.config.schema import Settings
from lfs_cli.errors import ConfigError, did_you_mean
from lfs_cli.files import parse_json, read_text

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
    _check_keys(schema, schema, tree)
    try:
        config = schema.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise _explain_rejection(schema, error) from None
    _check_finite(config.model_dump())
    return config


def find_config(path: Path | str) -> Path:
    """Return the config file that ``path`` names: as given, else in `configs/` here, else among those of lfs."""
    path = Path(path)
    package = Path(__file__).resolve().parents[1]
    folders = [Path("configs"), package.parent / "configs", package / "configs"]
    candidates = [path, *(folder / path for folder in folders), *(folder / f"{path}.json" for folder in folders)]
    for candidate in candidates:
        if _is_file(candidate):
            return candidate
    if _is_file(path / "config.json"):  # the folder of a run
        raise ConfigError(f"`{path}` is a folder", hint=f"name the file in it: `{path / 'config.json'}`")
    shipped = {file.name for folder in folders if folder.is_dir() for file in folder.glob("*.json")}
    hint = did_you_mean(path.name, shipped)
    near = get_close_matches(str(path), [str(file) for file in path.parent.glob("*.json")], n=1)
    if near and not hint.startswith("did you mean"):
        hint = f"did you mean `{near[0]}`?"
    raise ConfigError(f"no config `{path}` here or in `configs/`", hint=hint)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be read
        return False


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
        text = read_text(path).removeprefix("\ufeff")
        tree = json.loads(text, object_pairs_hook=refuse_twice)
        parse_json(text)  # refuses what is too deep or has half a character
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint="name a JSON file that you can read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})", hint="save it as UTF-8 JSON") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            hint='write one object, such as `{"steps": 100}`; JSON has no comments and no trailing commas',
        ) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply", hint="write one object of settings") from None
    except ValueError:  # Python reads no number of more than 4300 digits
        raise ConfigError(f"{path} holds a number that is too long", hint="write fewer digits") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} does not hold a JSON object", hint='write one, such as `{"steps": 100}`')
    return tree


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
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
                above = ".".join(parts[:depth])
                raise ConfigError(
                    f"`{where}` does not exist: `{above}` has {len(place)} {'entry' if len(place) == 1 else 'entries'}",
                    hint=f"use a number from 0 to {len(place) - 1}"
                    if len(place) > 1
                    else f"use `{above}.0`"
                    if place
                    else f"set the whole list, such as `--set '{above}=[\"...\"]'`",
                )
            if last:
                place[int(part)] = value
            else:
                place = place[int(part)]
        elif isinstance(place, dict):
            if inside is not None:
                if part not in inside.model_fields:
                    raise _unknown(schema, inside, ".".join(parts[:depth]), part)
                field = inside.model_fields[part]
                inside = _model_in(field)
                if part not in place and not last:
                    place[part] = _default_tree(field)
            if last:
                place[part] = value
            else:
                place = place.setdefault(part, {})
        else:
            raise ConfigError(
                f"`{'.'.join(parts[:depth])}` is a single value, so `{where}` does not exist",
                hint=f"set `{'.'.join(parts[:depth])}` itself",
            )


def _default_tree(field: FieldInfo) -> Any:
    """Return the default of ``field`` as JSON: complete for a list, empty for a model, whose defaults fill it."""
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
        return {}
    default = field.get_default(call_default_factory=True, validated_data={})
    return TypeAdapter(Any).dump_python(default, mode="json", exclude_unset=True)


def _check_keys(root: type[Settings], schema: type[Settings], tree: Any, where: str = "") -> None:
    """Raise ConfigError for the first key of ``tree`` that ``schema``, a part of ``root``, does not have."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key not in schema.model_fields:
            raise _unknown(root, schema, where, key)
        inner = _model_in(schema.model_fields[key])
        dotted = f"{where}.{key}" if where else key
        if inner and isinstance(value, list):
            for index, item in enumerate(value):
                _check_keys(root, inner, item, f"{dotted}.{index}")
        elif inner:
            _check_keys(root, inner, value, dotted)


def _check_finite(tree: Any, where: str = "") -> None:
    """Raise ConfigError for a number in ``tree`` that JSON does not have, as `options` of unknown types may hold."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        _check_finite(value, f"{where}.{key}" if where else str(key))
    if isinstance(tree, float) and not isfinite(tree):
        raise ConfigError(f"`{where}` must be a finite number, not `{tree}`", hint="write one, or leave it out")


def _unknown(root: type[Settings], schema: type[Settings], where: str, key: str) -> ConfigError:
    prefix = f"{where}." if where else ""
    known = [f"{prefix}{name}" for name in schema.model_fields]
    hint = did_you_mean(f"{prefix}{key}", known)
    elsewhere = settings_named(root, key, is_exact=hint.startswith("did you mean"))
    if elsewhere:
        hint = f"did you mean {' or '.join(f'`{name}`' for name in elsewhere)}?"
    return ConfigError(f"unknown key `{prefix}{key}`", hint=hint)


def settings_named(schema: type[Settings], name: str, *, is_exact: bool = False) -> list[str]:
    """Return the dotted names of the settings whose last part is ``name``, or unless ``is_exact`` looks like it.

    >>> settings_named(TrainConfig, "layers")
    ['model.layers']
    """
    homes: dict[str, list[str]] = {}
    for dotted, _, _ in explain(schema):
        homes.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    near = [name] if name in homes else get_close_matches(name, homes, n=1, cutoff=0.6)
    return [] if is_exact and name not in homes else [dotted for leaf in near for dotted in homes[leaf]]


def _explain_rejection(schema: type[Settings], error: ValidationError) -> ConfigError:
    """Turn pydantic's first complaint into our own words."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":  # half a character, which is all that JSON of our own can get wrong
        return ConfigError(
            "a setting is not UTF-8 text", hint="type it in a UTF-8 terminal, or write it into a UTF-8 file"
        )
    steps = [str(step) for step in first["loc"] if not str(step).startswith(("constrained-", "function-"))]
    while steps and steps[-1] in {"int", "float", "str", "bool", "none"}:  # pydantic names the branch of a union
        steps.pop()
    name = ".".join(steps)
    given = _shortened(json.dumps(first["input"], default=str))
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
        wanted = f"be at least {_plain_number(limits['ge'])}"
    elif first["type"] == "less_than_equal":
        wanted = f"be at most {_plain_number(limits['le'])}"
    elif first["type"] == "greater_than":
        wanted = f"be more than {_plain_number(limits['gt'])}"
    elif first["type"] == "too_short":
        wanted = f"have at least {limits['min_length']} entry"
    elif first["type"] == "literal_error":
        choices = str(limits["expected"]).replace("'", "").replace(" or ", ", ")
        return ConfigError(f"`{name}` cannot be {given}", hint=f"choose one of: {choices}")
    wanted = (wanted or first["msg"].lower()) + _word_instead(error)
    hint = _default_hint(schema, steps)
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        hint = f"put it in quotes: `--set '{name}=\"{given}\"'`"
    return ConfigError(f"`{name}` must {wanted}, not `{given}`", hint=hint)


def _word_instead(error: ValidationError) -> str:
    """Return what to add when the setting refused first may be a word, too: it is a union with such a branch."""
    first, *others = error.errors()
    for other in others:
        if other["type"] == "literal_error" and other["loc"][:-1] == first["loc"][:-1]:
            choices = other["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            return "".join(f', or `"{choice}"`' for choice in choices)
    return ""


def _default_hint(schema: type[Settings], steps: Sequence[str]) -> str:
    field = _field_at(schema, steps)
    example = _default_text(field) if field is not None else "derived"
    if example in {"derived", '""', "[]", "{}"}:
        names = [dotted for dotted, _, _ in explain(schema)]
        inside = [".".join(steps[:depth]) for depth in range(len(steps), 0, -1)]
        shown = next((name for name in inside if name in names), steps[0])
        return f"see `{shown}` in `lfs {schema.command} --explain`"
    return f"the default is `{example}`"


def _plain_number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


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
