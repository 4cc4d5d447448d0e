"""Frozen dataclasses to and from JSON, and checks of the numbers in them."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
import stat
import types
import typing
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Self

# Limits of JSON input: far above any config, far below noticeable time or memory.
LONGEST_JSON = 16 * 2**20  # bytes
DEEPEST_JSON = 64  # nested lists and objects
LARGEST_INTEGER = 2**63 - 1
# Limits of noise levels and sigma_data: squares, their sums and inverses stay finite in float32.
LOWEST_LEVEL, HIGHEST_LEVEL = 1e-18, 1e18


class JsonConfig:
    """Base of frozen dataclass configs: conversion to and from JSON, with checks of keys and types.

    A nested config is written with its class name under "type", so a field can hold one of several
    classes: those of its annotation, or of the dictionary `metadata["types"]` of the field. Without
    "type" it is read as the class of the default, or else the first class of the annotation.

    A subclass that overrides `__post_init__` must first call this class's, which checks the types
    of all fields and converts numbers of other libraries to Python numbers.
    """

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            plain = _plain(value)
            if not _matches(plain, hint, choices=False):
                raise TypeError(
                    f"{name} of {type(self).__name__} must be {_described(hint)}, "
                    f"got {value!r} of type {type(value).__name__}"
                )
            if plain is not value:
                object.__setattr__(self, name, plain)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = dataclasses.fields(typing.cast(Any, self))
        for field in fields:
            _check_registered(field, getattr(self, field.name))
        return {field.name: _encode(getattr(self, field.name)) for field in fields}

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json_text(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config with these fields; missing ones have their defaults.

        Raises:
            ValueError: `values` is not a dictionary, a key is not a field, a field without a
                default is missing, or a value does not have its field's type.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} must be a JSON object, got {values!r}")
        fields = dataclasses.fields(typing.cast(Any, cls))
        known = [field.name for field in fields]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {known}"
            )
        if missing := [f.name for f in fields if _is_required(f) and f.name not in values]:
            raise ValueError(f"{cls.__name__} lacks the field {', '.join(missing)}")
        hints = typing.get_type_hints(cls)
        hints |= {field.name: _registered(field) for field in fields if "types" in field.metadata}
        decoded = {name: _decode(value, hints[name]) for name, value in values.items()}
        for name, value in decoded.items():
            if not _matches(value, hints[name]):
                raise ValueError(
                    f"{cls.__name__}.{name} must be {_described(hints[name])}, got {values[name]!r}"
                )
        return cls(**decoded)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config written by `to_json`.

        Raises:
            ValueError: the text is not JSON, or not what `from_dict` takes.
        """
        return cls.from_dict(parse_json(text))


def read_json(path: Path, *, longest: int = LONGEST_JSON, infinite: bool = False) -> Any:
    """The JSON value in a file. All JSON files are read by this function.

    Args:
        path: a regular file in UTF-8, or a link to one.
        longest: the largest size in bytes.
        infinite: whether numbers may be infinite, as in some files of other libraries.

    Raises:
        ValueError: the path is not such a file, or `parse_json` refuses its text; the message
            names the file.
    """
    text = read_text(path, longest=longest)
    try:
        return parse_json(text, infinite=infinite)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_text(path: Path, *, longest: int = LONGEST_JSON) -> str:
    """The text of a regular UTF-8 file, without its BOM; does not open pipes or devices.

    Raises:
        ValueError: the path is not such a file, or the file is too long; the message names it.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it must be a regular file, not a folder, pipe or device")
        if found.st_size > longest:
            raise ValueError(f"it must have at most {longest:,} bytes, got {found.st_size:,}")
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """The JSON value of a text, with limits on nesting and numbers.

    Raises:
        ValueError: the text is not JSON, is nested deeper than `DEEPEST_JSON`, or holds NaN, an
            infinite number, or an integer of more than 64 bits.
    """

    def number(digits: str) -> float:
        value = float(digits)
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise ValueError(f"JSON must hold finite numbers, got {digits}")
        return value

    def integer(digits: str) -> int:
        if len(digits) > 20 or abs(int(digits)) > LARGEST_INTEGER:
            raise ValueError(f"JSON must hold integers of at most 64 bits, got {digits[:25]}...")
        return int(digits)

    try:
        value = json.loads(text, parse_float=number, parse_int=integer, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"it must be JSON: {error}") from error
    except RecursionError:
        depth = DEEPEST_JSON + 1
    else:
        depth = _depth(value)
    if depth > DEEPEST_JSON:
        raise ValueError(f"JSON must be nested at most {DEEPEST_JSON} deep, got more")
    return value


def _depth(value: Any) -> int:
    """The depth of nested lists and objects, counted up to one more than the limit."""
    level, depth = [value], -1
    while level and depth <= DEEPEST_JSON:
        inner = [v for v in level if isinstance(v, (dict, list))]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        depth += 1
        if not inner:
            break
    return depth


def json_text(value: Any, *, indent: int | None = 1) -> str:
    """A value as JSON text. All JSON files are written by this function.

    Raises:
        ValueError: a number is not finite, which JSON cannot represent; the message says where.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        place = next(_not_finite(value, ""), "")
        raise ValueError(f"JSON must hold finite numbers: {place or error}") from error


def _not_finite(value: Any, place: str) -> typing.Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"got {value} for {place or 'the value'}"
    parts = value.items() if isinstance(value, dict) else ()
    parts = enumerate(value) if isinstance(value, (list, tuple)) else parts
    for key, inner in parts:
        yield from _not_finite(inner, f"{place}[{key!r}]" if place else str(key))


def _encode(value: Any) -> Any:
    if isinstance(value, JsonConfig):
        return {"type": type(value).__name__, **value.to_dict()}
    return list(value) if isinstance(value, tuple) else value


def _check_registered(field: dataclasses.Field[Any], value: Any) -> None:
    """Raises ValueError for a config that could not be read back, before it is written."""
    if "types" not in field.metadata or not isinstance(value, JsonConfig):
        return
    kinds = (field.default_factory, *field.metadata["types"].values())
    if type(value) not in kinds:
        raise ValueError(
            f"{field.name} must be of a registered class to be written, got a "
            f"{type(value).__name__}; decorate it with dblocks.schedules.register"
        )


def _registered(field: dataclasses.Field[Any]) -> Any:
    """The union of the classes that a field may hold, with the default's class first."""
    return typing.Union[(field.default_factory, *field.metadata["types"].values())]


@lru_cache(maxsize=256)
def _hints(config: type) -> dict[str, Any]:
    """The annotations of fields by name, without those that cannot be resolved."""
    try:
        hints = typing.get_type_hints(config)
    except NameError:  # a class inside a function may use names that are only defined there
        return {}
    fields = dataclasses.fields(typing.cast(Any, config))
    return {f.name: hints[f.name] for f in fields if "types" not in f.metadata}


def _plain(value: Any) -> Any:
    """`value` with numbers of any library converted to Python numbers, and lists to tuples."""
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        plain = tuple(map(_plain, value))
        same = isinstance(value, tuple) and all(map(operator.is_, plain, value))
        return value if same else plain
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _decode(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    options = {kind.__name__: kind for kind in (*typing.get_args(hint), hint) if _is_config(kind)}
    if not isinstance(value, dict) or not options:
        return value
    fields = dict(value)
    name = fields.pop("type", next(iter(options), None))
    if not isinstance(name, str) or name not in options:
        raise ValueError(f"config type must be one of {sorted(options)}, got {name!r}")
    return options[name].from_dict(fields)


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, JsonConfig)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _matches(value: Any, hint: Any, *, choices: bool = True) -> bool:
    """Whether a value has the annotated type; an int counts as a float, a bool not as a number.

    Without `choices`, a value matches a `Literal` if it has the type of its values.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, arg, choices=choices) for arg in args)
    if origin is Literal:
        return value in args if choices else type(value) in map(type, args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(kinds) and all(map(_matches, value, kinds))
    if not isinstance(hint, type):
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _described(hint: Any) -> str:
    """A description of an annotation."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_described, args))
    if typing.get_origin(hint) is Literal:
        return f"one of {args}"
    return hint.__name__ if isinstance(hint, type) and not args else str(hint)


def check_block(block: int, num_blocks: int) -> int:
    """`block` as an int; it must be in 0 .. num_blocks - 1.

    Accepts integers of any library; reading a tensor on a GPU synchronises.
    """
    index = _integer(block)
    if index is None:
        raise TypeError(
            f"block must be an integer, got {block!r} of type {type(block).__name__}; "
            "convert it with int()"
        )
    if not 0 <= index < num_blocks:
        raise ValueError(f"block must be in 0..{num_blocks - 1}, got {index}")
    return index


def check_seed(seed: Any) -> Any:
    """`seed` as a 64-bit int in two's complement; accepts integers of any library.

    Tensors and symbolic integers of a graph are returned unchanged.
    """
    if isinstance(seed, (torch.Tensor, torch.SymInt)):
        return seed
    number = _integer(seed)
    if number is None:
        raise TypeError(
            f"seed must be an int or a 0-d int64 tensor, got {seed!r} of type "
            f"{type(seed).__name__}; convert it with int()"
        )
    # A symbolic integer has 64 bits, and a comparison would add a guard.
    if not torch.compiler.is_compiling() and not -(2**63) <= number < 2**63:
        raise ValueError(f"seed must fit in 64 bits (two's complement), got {number}; reduce it")
    return number


def check_overlap(overlap: float) -> None:
    """Raises ValueError unless `overlap` is finite and not negative."""
    check_finite("overlap", overlap)
    if overlap < 0:
        raise ValueError(f"overlap must not be negative, got {overlap}")


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a number in [0, 1]."""
    check_finite(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_count(name: str, value: int) -> int:
    """`value` as an int; it must be positive. Accepts integers of any library."""
    count = _integer(value)
    if count is None or count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return count


def _integer(value: object) -> int | None:
    # operator.index alone may not work in a compiled graph.
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def check_finite(name: str, value: float) -> float:
    """`value`; it must be a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value
