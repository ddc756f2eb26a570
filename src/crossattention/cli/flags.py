"""Flags of the command line out of frozen dataclasses: one source for names, types, defaults and help."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

Config = TypeVar("Config")


def flags_of(config: type, defaults: object | None, *, unset: Mapping[str, str] | None = None) -> type:
    """A dataclass of the same fields, for tyro, that checks nothing: `config` itself does when it is built of them.

    Args:
        config: a dataclass whose docstring describes each field.
        defaults: an instance that gives the defaults; without it, the class's own.
        unset: fields that are None unless given, with what the help says in the place of a default.

    Returns:
        The class, to be given to `tyro.cli`, alone or as a field's type.
    """
    hints = get_type_hints(config, include_extras=True)
    made: list[Any] = []
    for field in dataclasses.fields(config):
        hint: Any = hints[field.name]
        default = _default_of(field) if defaults is None else getattr(defaults, field.name)
        if unset and field.name in unset:
            default = None
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint=unset[field.name])]
        if default is None:
            hint = Annotated[hint, tyro.conf.arg(metavar=_name_without_none(hints[field.name]))]
        is_required = default is dataclasses.MISSING
        made.append((field.name, hint) if is_required else (field.name, hint, dataclasses.field(default=default)))
    flags = dataclasses.make_dataclass(config.__name__, made, frozen=True, kw_only=True)
    flags.__doc__ = config.__doc__
    return flags


def config_of(config: type[Config], flags: object, **changes: Any) -> Config:
    """The configuration that the flags say, with some fields changed."""
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(**{**values, **changes})


def _default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _name_without_none(hint: Any) -> str:
    """How a type that may be None reads in the help: FLOAT, not {None}|FLOAT, where None is what one gets without it."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return "|".join(getattr(kind, "__name__", str(kind)).upper() for kind in kinds if kind is not type(None))
