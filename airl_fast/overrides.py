"""From YAML and `a.b=v` to a validated configuration, or to one sentence that says which key is wrong.

pydantic does the typing. This file adds preset inheritance, command-line overrides, and messages that name the
file or the command-line word, the dotted key and the remedy.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from airl_fast.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML with two repairs: `1e-4` is a float (YAML 1.1 reads text), and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} repeats", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Resolvers are tried in order of registration; YAML's own come first and do not match these spellings.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


# ---------------------------------------------------------------------------------------------- reading YAML


def parse_yaml(text: str, *, origin: str) -> Any:
    """The value that `text` holds. Raises UserError naming `origin`, and the line where there is one."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark is not None else origin
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: this is not valid YAML ({problem}).") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the file `path`; an empty file is an empty mapping. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}; give a preset's name or the path of a YAML file.") from None
    tree = parse_yaml(text, origin=str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must hold `key: value` lines at the top, not a {type(tree).__name__}.")
    return tree


def find_preset(name_or_path: str, presets_dir: Path) -> tuple[dict[str, Any], str]:
    """The mapping of the preset `presets_dir/NAME.yaml` or of a YAML file, and the name of its origin for messages.

    A top-level `extends: OTHER` starts from another preset (or from a file, relative to this one) and merges this
    file over it, section by section. Raises UserError for an unknown preset, a cycle or a malformed file.
    """
    path = _preset_path(name_or_path, presets_dir, base=Path())
    chain = [path]
    tree = read_yaml(path)
    while (parent := tree.pop("extends", None)) is not None:
        if not isinstance(parent, str):
            raise UserError(f"{chain[-1]}: 'extends' must be the name of one preset, not {parent!r}.")
        path = _preset_path(parent, presets_dir, base=chain[-1].parent)
        if path.resolve() in [p.resolve() for p in chain]:
            raise UserError(f"{chain[-1]}: 'extends: {parent}' leads back to a file that extends this one; remove it.")
        chain.append(path)
        tree = deep_merge(read_yaml(path), tree)
    origin = str(chain[0])
    if len(chain) > 1:
        origin += f" (extends {', '.join(p.stem for p in chain[1:])})"
    return tree, origin


def _preset_path(name: str, presets_dir: Path, *, base: Path) -> Path:
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = base / Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; give the path of a YAML file or a preset's name.")
        return path
    names = sorted(p.stem for p in presets_dir.glob("*.yaml"))
    if name in names:
        return presets_dir / f"{name}.yaml"
    hint = _did_you_mean(difflib.get_close_matches(name, names, n=1))
    raise UserError(f"There is no preset '{name}'{hint or '.'} The presets are: {', '.join(names) or 'none'}.")


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; sections merge, everything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = deep_merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def dump_yaml(config: BaseModel) -> str:
    """YAML of every key, defaults included, in declaration order. `load_config` reads back an equal config."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def plain(config: BaseModel) -> dict[str, Any]:
    """The config as dicts, lists and scalars only; floats (inf too) keep their exact value."""
    return _plain(config.model_dump(mode="python"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "value") and not isinstance(value, (int, float, str)):  # a plain Enum
        return value.value
    for base in (bool, int, float, str):  # an IntEnum or StrEnum becomes its number or text
        if isinstance(value, base):
            return base(value)
    return value


# ---------------------------------------------------------------------------------------------- validation


def load_config(model_cls: type[Model], source: Mapping[str, Any], overrides: Sequence[str], *, origin: str) -> Model:
    """A validated `model_cls` from `source` (a file's mapping) with `a.b=v` overrides on top.

    origin: what to call the source in messages. Values of overrides are YAML, so `x=1e-4`, `x=[1,2]`, `x=null` and
    `x=true` are typed; an empty value (`x=`) is empty text. Raises UserError, one sentence, for every mistake, and for
    a key of `model_cls.NEVER_FROM_A_FILE` that the source sets to something.
    """
    config = _validated(model_cls, source, overrides, origin)
    for key, reason in getattr(model_cls, "NEVER_FROM_A_FILE", {}).items():
        keys = tuple(key.split("."))
        by_words = _validated(model_cls, _without(source, keys), overrides, origin)
        if _at(config, keys) != _at(by_words, keys):
            raise UserError(f"{origin}: '{key}' is set there: {reason}.")
    return config


def _at(config: BaseModel, keys: tuple[str, ...]) -> Any:
    for key in keys:
        config = getattr(config, key)
    return config


def _without(tree: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `tree` that does not have the value at `keys`."""
    head, *rest = keys
    if not rest or not isinstance(tree.get(head), Mapping):
        return {name: value for name, value in tree.items() if name != head or rest}
    return {**tree, head: _without(tree[head], tuple(rest))}


def _validated(model_cls: type[Model], source: Mapping[str, Any], overrides: Sequence[str], origin: str) -> Model:
    tree = deep_merge({}, source)
    words: dict[tuple[str, ...], str] = {}
    for word in overrides:
        keys, value = _parse_override(word)
        tree = _set(tree, keys, value, word)
        words[keys] = word
    try:
        config = model_cls.model_validate(tree)
    except ValidationError as failure:
        # A misspelt required key is both unknown and missing: the unknown key is what to tell.
        errors = sorted(failure.errors(), key=lambda e: e["type"] != "extra_forbidden")
        key = _key_of(errors[0], tree)
        sentence = f"{_origin_of(key, words, origin)}: {_explain(errors[0], key, model_cls)}"
        more = len({_key_of(e, tree) for e in errors}) - 1  # a value that fits no member of a union counts once
        if more:
            sentence = f"{sentence.removesuffix('.')} (and {more} more problem{'s' if more > 1 else ''})."
        raise UserError(sentence) from None
    for key in _truths(tree):  # pydantic reads true as 1, but `seed=true` is a mistake
        field = _field(model_cls, key)
        allowed = set(_leaves(field.annotation)) if field is not None else set()
        if allowed & {int, float} and bool not in allowed:
            expected = "a whole number" if int in allowed else "a number"
            raise UserError(
                f"{_origin_of(key, words, origin)}: '{'.'.join(key)}' must be {expected}, not true or false."
            )
    return config


def _truths(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterable[tuple[str, ...]]:
    """The keys whose value is true or false."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _truths(value, (*prefix, str(name)))
        elif isinstance(value, bool):
            yield (*prefix, str(name))


def _parse_override(word: str) -> tuple[tuple[str, ...], Any]:
    name, sign, text = word.partition("=")
    keys = tuple(name.strip().split("."))
    if not sign or not all(keys):
        raise UserError(
            f"command line, '{word}': an override is written key=value, for example seed=1 or data.path=DIR."
        )
    value = parse_yaml(text, origin=f"command line, '{word}'") if text.strip() else ""
    return keys, value


def _set(tree: dict[str, Any], keys: tuple[str, ...], value: Any, word: str) -> dict[str, Any]:
    """A copy of `tree` with `value` at `keys`; a mapping given for a section merges into it."""
    head, *rest = keys
    if not rest:
        return deep_merge(tree, {head: value})
    child = tree.get(head)
    if child is not None and not isinstance(child, Mapping):
        raise UserError(f"command line, '{word}': '{head}' is a single value ({child!r}) and has no key '{rest[0]}'.")
    return {**tree, head: _set(dict(child or {}), tuple(rest), value, word)}


def _key_of(error: Mapping[str, Any], tree: Any) -> tuple[str, ...]:
    """The error's location without the union and variant names that pydantic mixes into it."""
    key: list[str] = []
    here = tree
    for position, part in enumerate(error["loc"]):
        in_list = isinstance(here, (list, tuple)) and isinstance(part, int) and part < len(here)
        if in_list or (isinstance(here, Mapping) and part in here):
            here = here[part]
        elif not (error["type"] == "missing" and position == len(error["loc"]) - 1):
            continue
        key.append(str(part))
    return tuple(key)


def _origin_of(key: tuple[str, ...], words: Mapping[tuple[str, ...], str], origin: str) -> str:
    for path, word in reversed(words.items()):
        shared = min(len(path), len(key))
        if shared and path[:shared] == key[:shared]:
            return f"command line, '{word}'"
    return origin


def _explain(error: Mapping[str, Any], key: tuple[str, ...], model_cls: type[BaseModel]) -> str:
    """One sentence for one pydantic error."""
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    name = ".".join(key)
    if kind == "extra_forbidden":
        known = dotted_keys(model_cls)
        siblings = [k.split(".")[-1] for k in known if k.split(".")[:-1] == list(key[:-1])]
        where = f"'{'.'.join(key[:-1])}'" if len(key) > 1 else "the configuration"
        hint = _did_you_mean(_similar_keys(key, known))
        return f"unknown key '{name}'{hint or f'; the keys of {where} are: ' + ', '.join(siblings) + '.'}"
    if kind == "missing" and key[-1].isdigit():
        return f"'{'.'.join(key[:-1])}' needs more than {key[-1]} item{'s' if key[-1] != '1' else ''}."
    if kind == "missing":
        return f"'{name}' is required; add it."
    if kind == "union_tag_not_found":
        return (
            f"'{name}.{context['discriminator'].strip(chr(39))}' is required, it says which kind '{name}' is; add it."
        )
    if kind == "union_tag_invalid":
        key, context = (*key, context["discriminator"].strip("'")), {"expected": context["expected_tags"]}
        kind, name, value = "literal_error", ".".join(key), error["ctx"]["tag"]
    field = _field(model_cls, key)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        allowed = _range(field, context)
        if kind == "finite_number":
            allowed = f"finite and {allowed}" if allowed else "finite"
        return f"'{name}' is {value!r}, which is out of range; it must be {allowed}."
    if kind in ("literal_error", "enum"):
        options = re.findall(r"'([^']*)'", context.get("expected", ""))
        hint = _did_you_mean(difflib.get_close_matches(str(value), options, n=1))
        return f"'{name}' is {value!r}{hint or ','} {'It' if hint else 'but it'} must be {context.get('expected')}."
    if kind == "value_error":
        text = str(context.get("error", error["msg"])).strip().removesuffix(".")
        whole_section = isinstance(value, (Mapping, BaseModel))  # a check across keys names them itself
        return f"{text}." if whole_section else f"'{name}': {text}."
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"'{name}' is a section of keys, not the single value {value!r}; write '{name}.KEY'."
    if kind in _EXPECTED:
        return f"'{name}' must be {_EXPECTED[kind]}, not {value!r}."
    message = error["msg"].removesuffix(".")
    return f"'{name}' is {value!r}: {message[:1].lower()}{message[1:]}."


_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
    **dict.fromkeys(("path_type", "path_str"), "a path"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "a list, as in [1, 2]"),
}


def _range(field: FieldInfo | None, context: Mapping[str, Any]) -> str:
    """The allowed range in words: from the field's own bounds, else from the one bound the error names."""
    bounds = dict(context)
    for item in field.metadata if field is not None else ():
        for name in ("gt", "ge", "lt", "le"):
            if getattr(item, name, None) is not None:
                bounds[name] = getattr(item, name)
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{words[b]} {bounds[b]}" for b in words if b in bounds)


# ---------------------------------------------------------------------------------------------- names of keys


def dotted_keys(model_cls: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of the model and of its sections: ['seed', 'data', 'data.path', …]."""
    keys: list[str] = []
    for name, field in model_cls.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(field.annotation):
            keys += [k for k in dotted_keys(inner, f"{prefix}{name}.") if k not in keys]
    return keys


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """The models inside an annotation such as `A | B | None`, `Annotated[A, …]` or `tuple[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _leaves(annotation: Any) -> Iterable[Any]:
    """The types inside an annotation: int and NoneType for `int | None`."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _leaves(argument)


def _field(model_cls: type[BaseModel], key: tuple[str, ...]) -> FieldInfo | None:
    """The declaration of a dotted key, None where the model does not say (an entry of a list or mapping)."""
    if not key or key[0] not in model_cls.model_fields:
        return None
    field = model_cls.model_fields[key[0]]
    if len(key) == 1:
        return field
    found = (_field(inner, key[1:]) for inner in _models_in(field.annotation))
    return next((f for f in found if f is not None), None)


def _similar_keys(key: tuple[str, ...], known: Sequence[str]) -> list[str]:
    """Up to two known keys that an unknown one may stand for: near its own level first, then anywhere."""
    *section, leaf = key
    depth = len(section)
    siblings = {k.split(".")[-1]: k for k in known if k.split(".")[:-1] == section and k.count(".") == depth}
    near = difflib.get_close_matches(leaf, siblings, n=1)
    if near:
        return [siblings[near[0]]]
    same_leaf = [k for k in known if k.split(".")[-1] == leaf]  # right name, wrong section
    if same_leaf:
        return same_leaf[:2]
    elsewhere = difflib.get_close_matches(leaf, {k.split(".")[-1] for k in known}, n=1)
    return [k for k in known if k.split(".")[-1] in elsewhere][:2]


def _did_you_mean(candidates: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(repr(c) for c in candidates)}?" if candidates else ""
