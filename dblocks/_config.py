"""Frozen dataclasses to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

from typing_extensions import Self


class JsonConfig:
    """Base of frozen dataclass configs: JSON both ways, unknown keys are an error.

    A nested config is written with its class name under "type", so that a field can hold one of
    several configs.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = dataclasses.fields(typing.cast(Any, self))
        return {field.name: _encode(getattr(self, field.name)) for field in fields}

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config with these fields; absent ones keep their defaults.

        Raises:
            ValueError: a key is not a field.
        """
        known = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {known}"
            )
        hints = typing.get_type_hints(cls)
        return cls(**{name: _decode(value, hints[name]) for name, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config written by `to_json`.

        Raises:
            ValueError: the text is not a JSON object, or a key is not a field.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} must be a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


def _encode(value: Any) -> Any:
    if isinstance(value, JsonConfig):
        return {"type": type(value).__name__, **value.to_dict()}
    return list(value) if isinstance(value, tuple) else value


def _decode(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    options = {kind.__name__: kind for kind in (*typing.get_args(hint), hint) if _is_config(kind)}
    fields = dict(value)
    name = fields.pop("type", next(iter(options), None))
    if name not in options:
        raise ValueError(f"config type must be one of {sorted(options)}, got {name!r}")
    return options[name].from_dict(fields)


def _is_config(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, JsonConfig)
