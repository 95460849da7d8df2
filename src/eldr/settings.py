"""Declares each setting once: a field of a dataclass carries its default, its range and its meaning.

    @dataclass
    class QueueLimits:
        max_queued: int = setting(1024, "most waiting requests of each priority", least=0)

The check, the flag, the reload and the line of documentation all come from the declaration, so they cannot drift apart.
The annotation gives the type: int, float, bool, str or Path, each also `| None`. Any other type needs `parse`.

A dataclass may hold others as a `group`. Users do not see groups: in files and flags, all keys are at one level.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from eldr.errors import EldrError

MOST_WHOLE = 2**31
_SETTING, _GROUP = "eldr.setting", "eldr.group"

T = TypeVar("T")
Parse = Callable[[str, Any], Any]


class SettingError(EldrError):
    """A value that a setting cannot have, or a key that is not a setting. The message names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One declared setting. `setting` describes most fields.

    key: the field's name. kind: the annotated type, without None. optional: whether None is allowed.
    path: the names of the groups that lead to the dataclass that holds the setting.
    """

    help: str
    least: float
    most: float
    infinite: bool
    choices: tuple[str, ...]
    parse: Parse | None
    flag: str
    metavar: str
    live: bool
    shown: str
    page: str
    section: str
    default: Any
    key: str = ""
    kind: Any = None
    optional: bool = False
    path: tuple[str, ...] = ()

    @property
    def default_text(self) -> str:
        """The default as help and documentation show it. Empty if there is nothing to show."""
        if self.shown or self.default is None or get_origin(self.kind) is not None:
            return self.shown
        if self.kind is bool:
            return str(self.default).lower()
        return f"{self.default:g}" if self.kind is float else str(self.default)

    @property
    def expected(self) -> str:
        """The values allowed, as a phrase that follows "expected" in a message."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is int:
            return f"a whole number from {int(self.least)} to {int(self.most)}"
        if self.kind is float:
            noun = "seconds" if self.key.endswith("_s") else "a number"
            most = "" if self.most == sys.float_info.max else f" to {self.most:g}"
            return f"{noun} from {self.least:g}{most}{', or inf' if self.infinite else ''}"
        names: dict[Any, str] = {bool: "true or false", str: "text", Path: "the path of a file"}
        return names.get(self.kind, f"a {getattr(self.kind, '__name__', self.kind)}")

    def of(self, value: Any) -> Any:
        """Convert a value from the form that files and flags give. Raises EldrError if it cannot be parsed."""
        if self.parse is not None:
            return self.parse(self.key, value)
        return Path(value) if self.kind is Path and isinstance(value, str) and value else value

    def check(self, value: Any) -> None:
        """Raises SettingError if the setting cannot have this value."""
        if not (value is None and self.optional) and not self._fits(value):
            raise SettingError(f"{self.key} is {value!r}, expected {self.expected}")

    def holder(self, owner: Any) -> Any:
        """The object within `owner` that has this setting as an attribute."""
        return reduce(getattr, self.path, owner)

    def _fits(self, value: Any) -> bool:
        if self.kind in (int, float):
            if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
                return False
            return self.least <= value <= self.most or (self.infinite and value == float("inf"))
        if self.kind is str:
            return isinstance(value, str) and value != "" and (not self.choices or value in self.choices)
        return isinstance(value, get_origin(self.kind) or self.kind)


def setting(
    default: Any,
    help: str,
    *,
    least: float = 0,
    most: float | None = None,
    infinite: bool = False,
    choices: Iterable[str] = (),
    parse: Parse | None = None,
    flag: bool | str = False,
    metavar: str = "",
    live: bool = False,
    shown: str = "",
    page: str = "",
    section: str = "",
) -> Any:
    """Declare a field of a dataclass as a setting.

    help: its meaning, as a phrase. For a bool, an imperative that says what true does. The flag negates it.
    least, most: the range of a number, both ends included. By default from 0, and for whole numbers to MOST_WHOLE.
    infinite: whether inf is allowed too. choices: the values allowed for text.
    parse: called with the key and the value as files and flags give it. Returns the value, or raises EldrError.
    flag: True for a flag named after the key, or the flag's name. metavar: the flag's placeholder in help.
    live: whether a reload changes the setting in a running process.
    shown: replaces the default in help and documentation where its own text would say nothing.
    page: the documentation page with more detail. section: the heading, by default that of the group.
    """
    declared = Setting(
        help=help, least=least, most=sys.float_info.max if most is None else most, infinite=infinite,
        choices=tuple(choices), parse=parse, flag=flag if isinstance(flag, str) else "-" * flag, metavar=metavar,
        live=live, shown=shown, page=page, section=section, default=default,
    )  # fmt: skip
    metadata = {_SETTING: declared}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def group(section: str = "") -> Any:
    """Declare a field that holds another dataclass of settings. section: the heading of those settings."""
    return field(metadata={_GROUP: section})


def settings_of(cls: type) -> tuple[Setting, ...]:
    """All settings of a dataclass and of its groups, in the order of their declaration.

    Those that its attribute `without` names are none of its settings. They keep their defaults.
    """
    types = get_type_hints(cls)
    without: frozenset[str] = getattr(cls, "without", frozenset())
    found: list[Setting] = []
    for each in dataclasses.fields(cls):
        kind = types[each.name]
        if _GROUP in each.metadata:
            found += [
                dataclasses.replace(one, path=(each.name, *one.path), section=one.section or each.metadata[_GROUP])
                for one in settings_of(kind)
            ]
        else:
            found.append(_complete(each.metadata[_SETTING], each.name, kind))
    return tuple(one for one in found if one.key not in without)


def check(owner: Any) -> None:
    """Check the settings that `owner` has itself, not those of its groups. Raises SettingError."""
    for one in settings_of(type(owner)):
        if not one.path:
            one.check(getattr(owner, one.key))


def parsed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert those of `values` that are settings of `cls` itself, from the form that files and flags give.

    Does not check ranges. Raises EldrError for a value that cannot be parsed.
    """
    return {one.key: one.of(values[one.key]) for one in settings_of(cls) if not one.path and one.key in values}


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make an object of `cls`, with its groups, from flat values as files and flags give them.

    Raises EldrError for a value that cannot be used, and SettingError for a key that is not a setting.
    """
    known = sorted(one.key for one in settings_of(cls))
    for key in sorted(values):
        if key not in known:
            raise SettingError(f"unknown key {key!r}; the keys are {', '.join(known)}")
    return _build(cls, values)


def adopt(owner: Any, new: Any) -> list[str]:
    """Copy the live settings from `new`, of the same class, to `owner`. Returns the keys of other changed settings."""
    fixed = []
    for one in settings_of(type(owner)):
        value = getattr(one.holder(new), one.key)
        if getattr(one.holder(owner), one.key) == value:
            continue
        if one.live:
            setattr(one.holder(owner), one.key, value)
        else:
            fixed.append(one.key)
    return fixed


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add the flags of the settings of `cls`. None has a default, so `given` finds only flags that were used."""
    sections: dict[str, argparse._ArgumentGroup] = {}
    for one in settings_of(cls):
        if one.flag:
            if one.section not in sections:
                sections[one.section] = parser.add_argument_group(one.section)
            sections[one.section].add_argument(one.flag, dest=one.key, default=argparse.SUPPRESS, **_flag_type(one))


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of `cls` that were given as flags, as flat values."""
    return {one.key: getattr(arguments, one.key) for one in settings_of(cls) if hasattr(arguments, one.key)}


def text(key: str, value: Any) -> str:
    """Return `value` if it is non-empty text. For use in `parse`. Raises SettingError."""
    if not isinstance(value, str) or not value:
        raise SettingError(f"{key} is {value!r}, expected text")
    return value


def _complete(declared: Setting, key: str, annotation: Any) -> Setting:
    """The declaration, completed from the field's name and annotation."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    optional = NoneType in get_args(annotation)
    kind = kinds[0] if optional else annotation
    most = MOST_WHOLE if kind is int and declared.most == sys.float_info.max else declared.most
    flag = declared.flag
    if flag == "-":
        flag = f"--{'no-' if kind is bool else ''}{key.removesuffix('_s').replace('_', '-')}"
    return dataclasses.replace(declared, key=key, kind=kind, optional=optional, most=most, flag=flag)


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    types = get_type_hints(cls)
    own = parsed(cls, values)
    for each in dataclasses.fields(cls):  # type: ignore[arg-type]
        if _GROUP in each.metadata:
            own[each.name] = _build(types[each.name], values)
    made = cls(**own)
    check(made)
    return made


def _flag_type(one: Setting) -> dict[str, Any]:
    """The arguments of `add_argument` for the flag of a setting."""
    default = f" ({one.default_text})" if one.default_text else ""
    about: dict[str, Any] = {"help": (one.help + default).replace("%", "%%")}
    container = get_origin(one.kind)
    if one.kind is bool:
        return about | {"action": "store_false", "help": f"do not {one.help}"}
    if one.choices:
        return about | {"choices": one.choices}
    if container is None:
        about["type"] = one.kind if one.kind in (int, float, Path) else str
        about["metavar"] = one.metavar or _metavar(one)
    else:
        about |= {"action": "append", "metavar": one.metavar, "help": f"{one.help} (repeatable)"}
        if issubclass(container, Mapping):
            about["type"] = lambda text: _pair(text, one.metavar)
    return about


def _metavar(one: Setting) -> str | None:
    if one.key.endswith("_s"):
        return "SECONDS"
    kinds: dict[Any, str] = {int: "N", float: "X", Path: "FILE"}
    return kinds.get(one.kind)


def _pair(text: str, form: str) -> tuple[str, str]:
    name, _, value = text.rpartition("=")
    if value and "=" not in text and form.startswith("["):  # the name may be left out
        return "", value
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {form}")
    return name, value
