"""Configuration files: YAML merged left to right, then `section.key=value` overrides, into a checked RunConfig.

    config = load(["recipe/demo.yaml", "my.yaml"], ["phases[0].schedule.max_lr=1e-3"])
    print(dump(config))

A path that does not exist is looked for among the configurations that come with megacl. Lists are replaced as a whole,
mappings merge key by key. Whatever is wrong is said in one line: the setting's path, its value, what was expected.
"""

import dataclasses
import difflib
import functools
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from megacl.config import RunConfig
from megacl.config_cluster import ClusterConfig
from megacl.config_phase import PhaseConfig, nearest
from megacl.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, with three changes: 3e-4 is a number, 1:30:00 is a text and
    not a number of base 60, and a key that stands twice is an error."""


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads: it quotes text that would be read as a number, "3e-4" for one."""


_Schema = TypeVar("_Schema")

_NUMBERS = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.nan)$"
)
_INT = re.compile(r"[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    for key in names:
        if isinstance(key, yaml.ScalarNode):
            key.tag = "tag:yaml.org,2002:str"  # keys are names: a source may be called no, 1.5, or 2026-11-24
    keys = [key.value for key in names]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
    loader.flatten_mapping(node)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def shipped(name: str) -> Path:
    """The folder `name` ("configs", "slurm", "examples") that comes with megacl: in the package, or in its checkout."""
    package = Path(__file__).parent
    return next((folder for folder in (package / name, package.parent / name) if folder.is_dir()), package / name)


def find_shipped(path: str) -> str:
    """A path as given where it exists, else the file that comes with megacl under that name: examples/data/..., say."""
    folder, _, rest = path.partition("/")
    ours = shipped(folder) / rest
    return str(ours) if rest and not Path(path).exists() and ours.exists() else path


def find_config(path: str) -> Path:
    """A configuration file: as given, or among those that come with megacl. Raises ConfigError if there is none."""
    given, ours = Path(path), shipped("configs")
    for candidate in (given, ours / given):
        if candidate.is_file():
            return candidate
    known = sorted(str(file.relative_to(ours)) for file in ours.rglob("*.yaml"))
    hint = nearest(path, known)
    raise ConfigError(f"{path}: no such file, and no configuration of that name comes with megacl{hint}")


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} {error.problem}; it is not valid YAML.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: it is not valid YAML: {' '.join(str(error).split())}.") from None


def merge(under: Any, over: Any) -> Any:
    """Plain data laid over other plain data: mappings merge key by key, all else is replaced as a whole."""
    if isinstance(under, dict) and isinstance(over, dict):
        merged = dict(under)
        for key, value in over.items():
            merged[key] = merge(under[key], value) if key in under else value
        return merged
    return over


def _set(tree: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(tree, list):
        if not key.isdigit() or int(key) >= len(tree):
            raise ConfigError(f"{override}: there is no element {key}; the list has {len(tree)}, counted from 0.")
        return [_set(item, rest, value, override) if int(key) == at else item for at, item in enumerate(tree)]
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{override}: {key!r} lies below a plain value, {tree!r}.")
    return {**(tree or {}), key: _set((tree or {}).get(key), rest, value, override)}


def load_tree(paths: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """YAML files merged left to right, then `section.key=value` overrides, as plain data, unchecked."""
    tree: Any = {}
    for path in paths:
        file = find_config(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}.") from None
        content = _parse(text, str(file))
        if not isinstance(content, dict):
            raise ConfigError(f"{file}: it holds no mapping of settings; it must begin with a line such as 'model:'.")
        tree = merge(tree, content)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: an override has the form section.key=value.")
        keys = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        tree = _set(tree, keys, _parse(value, override), override)
    return dict(tree)


def load(paths: Sequence[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of a run. Raises ConfigError, in one line, at the first thing that is wrong."""
    return from_tree(load_tree(paths, overrides))


def load_arguments(arguments: Sequence[str]) -> RunConfig:
    """`load` of a command line's arguments."""
    return from_tree(tree_of_arguments(arguments))


def tree_of_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """`load_tree` of a command line's arguments: what holds an "=" and is no file's name is an override."""
    files = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]
    return load_tree(files, [argument for argument in arguments if argument not in files])


def load_cluster(name: str, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The checked cluster file of a path, or of a name that comes with megacl, with `key=value` overrides.

    Raises ConfigError, in one line, at the first thing that is wrong.
    """
    path = name if os.path.isfile(name) or name.endswith((".yaml", ".yml")) else f"cluster/{name}.yaml"
    tree = load_tree([path], overrides)
    try:
        cluster = checked(tree, ClusterConfig)
    except ConfigError as error:
        raise ConfigError(f"cluster {name}: {error}") from None
    cluster.check()
    return cluster


@functools.cache
def _adapter(section: Any) -> TypeAdapter[Any]:
    return TypeAdapter(section)  # takes 50 ms to build


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """A configuration out of plain data; raises ConfigError at the first thing that is wrong."""
    config = checked(tree, RunConfig)
    config.check()
    return config


def checked(tree: Any, schema: type[_Schema]) -> _Schema:
    """Plain data as a frozen dataclass of settings; rules that tie settings together are its own business.

    Raises ConfigError at the first thing that is wrong.
    """
    _check_keys(tree, schema, "", root=schema)
    try:
        config: _Schema = _adapter(typing.cast(Any, schema)).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, schema)) from None
    return config


def to_tree(config: Any, *, defaults: bool = True) -> dict[str, Any]:
    """A configuration (or one of its sections) as plain data, every setting spelled out.

    defaults: if False, settings that have their default value are left out.
    """
    tree: dict[str, Any] = _adapter(config.__class__).dump_python(
        config, mode="json", by_alias=True, exclude_defaults=not defaults
    )
    return tree


def dump(config: RunConfig) -> str:
    """The configuration as YAML, every setting spelled out; `load` of it gives the same configuration back."""
    return dump_tree(to_tree(config))


def dump_tree(tree: dict[str, Any]) -> str:
    """Plain data as YAML that `load_tree` reads as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# ---------------------------------------------------------------------------------------------- what went wrong


def _key(item: "dataclasses.Field[Any]", hint: Any) -> str:
    for meta in getattr(hint, "__metadata__", ()):
        if getattr(meta, "alias", None):
            return str(meta.alias)
    return item.name


def _settings(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section, include_extras=True)
    return {_key(item, hints[item.name]): hints[item.name] for item in dataclasses.fields(section)}


def _sections(hint: Any) -> list[type]:
    """The dataclasses that a type hint allows at this place."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [section for part in typing.get_args(hint) for section in _sections(part)]
    return [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []


def _element(hint: Any, container: type) -> Any:
    """The hint of the elements of a tuple or of the values of a dict, or None."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((found for part in typing.get_args(hint) if (found := _element(part, container))), None)
    if typing.get_origin(hint) is container:
        return typing.get_args(hint)[1 if container is dict else 0]
    return None


def _all_settings(section: type, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, path) of every setting below a section."""
    for key, hint in _settings(section).items():
        yield key, f"{path}{key}"
        for below, suffix in ((hint, "."), (_element(hint, tuple), "[]."), (_element(hint, dict), ".NAME.")):
            for found in _sections(below):
                yield from _all_settings(found, f"{path}{key}{suffix}")


def _check_keys(tree: Any, section: type, path: str, *, root: type) -> None:
    """Raises ConfigError at the first key that the schema does not know, naming the nearest that it knows."""
    if not isinstance(tree, dict):
        return  # pydantic says what was expected
    settings = _settings(section)
    for key, value in tree.items():
        if key not in settings:
            close = difflib.get_close_matches(str(key), list(settings), n=1, cutoff=0.5)
            elsewhere = dict(_all_settings(root))
            if str(key) in elsewhere and not (close and close[0].startswith(str(key))):
                hint = f"; it belongs at {elsewhere[str(key)]}."
            elif close:
                hint = f"; did you mean {path}{close[0]}?"
            else:
                hint = f"; known here: {', '.join(settings)}."
            raise ConfigError(f"{path}{key} is not a setting{hint}")
        _check_value(value, settings[key], f"{path}{key}", root=root)


def _check_value(value: Any, hint: Any, path: str, *, root: type) -> None:
    if isinstance(value, dict):
        sections = _sections(hint)
        if len(sections) > 1:
            by_kind = {typing.get_args(_settings(section)["kind"])[0]: section for section in sections}
            sections = [by_kind[str(value["kind"])]] if str(value.get("kind")) in by_kind else []
        if sections:
            _check_keys(value, sections[0], f"{path}.", root=root)
        elif (element := _element(hint, dict)) is not None:
            for key, item in value.items():
                _check_value(item, element, f"{path}.{key}", root=root)
    elif isinstance(value, list) and (element := _element(hint, tuple)) is not None:
        for index, item in enumerate(value):
            _check_value(item, element, f"{path}[{index}]", root=root)


def _explain(error: ValidationError, schema: Any) -> str:
    """The first of pydantic's errors in one line: the setting, its value, what was expected, what it is."""
    # A union reports one error a member: the one that got furthest says most.
    first = max(error.errors(include_url=False), key=lambda item: len(item["loc"]))
    kinds = set(_kinds())
    path, found = "", schema
    for part in first["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
            found = _element(found, tuple)
            continue
        sections = _sections(found)
        settings = {key: below for section in sections for key, below in _settings(section).items()}
        if part in settings:
            path += f".{part}" if path else part
            found = settings[part]
        elif (element := _element(found, dict)) is not None:
            path += f".{part}"
            found = element
        elif part in kinds:
            found = next(s for s in sections if typing.get_args(_settings(s)["kind"])[0] == part)
    expected = first["msg"].removeprefix("Value error, ")
    expected = re.sub(r"^Input should be", "it must be", expected)
    expected = re.sub(r"^String should", "it must", expected)
    expected = "it is too large" if first["type"] == "int_parsing_size" else expected
    if first["type"] in ("missing", "missing_argument"):
        return f"{path} is missing; every configuration must give it{_description(found)}."
    if first["type"] == "union_tag_not_found":
        return f"{path}.kind is missing; it must be one of {', '.join(_kinds())}."
    if first["type"] == "union_tag_invalid":
        value = first["input"]["kind"]
        return f"{path}.kind is {value!r}; it must be one of {', '.join(_kinds())}{nearest(str(value), _kinds())}"
    if first["type"] in ("dataclass_type", "dict_type"):
        return f"{path or 'the configuration'} is {first['input']!r}; it must be a mapping of settings."
    if first["type"] in ("tuple_type", "list_type"):
        return f"{path} is {first['input']!r}; it must be a list."
    return f"{path} is {first['input']!r}; {expected}{_description(found)}."


def _kinds() -> list[str]:
    hint = _settings(PhaseConfig)["schedule"]
    return [typing.get_args(_settings(section)["kind"])[0] for section in _sections(hint)]


def _description(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((found for part in typing.get_args(hint) if (found := _description(part))), "")
    for meta in getattr(hint, "__metadata__", ()):
        if getattr(meta, "description", None):
            return f". It is {meta.description}"
    return ""
