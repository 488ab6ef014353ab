"""Settings from JSON: the values of a ``Config``, each of exactly the type that it declares."""

import dataclasses
import math
import pathlib
import reprlib
import types
import typing
from typing import Any

LARGEST = 2**63 - 1


def restore(kind: Any, values: Any, where: str = "settings") -> Any:
    """The dataclass `kind` with the fields in `values`, as JSON has them.

    Only what the types declare is made: numbers, text, paths, tuples and lists and dicts of them, other dataclasses.

    Args:
      kind: a dataclass.
      values: ``{field: value}``, all of its fields and no other.
      where: what the messages call `values`.

    Returns:
      an instance of `kind`.

    Raises:
      ValueError: a field that is unknown, missing, of another type or out of range, by its name.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {_short(values)}, must be an object of settings")
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    if unknown := sorted(set(values) - fields):
        raise ValueError(f"{where}: {_short(unknown)} is no setting of this experiment; it has {', '.join(sorted(fields))}")
    if missing := sorted(fields - set(values)):
        raise ValueError(f"{where}: {', '.join(missing)} is missing; every setting must be given")
    hints = typing.get_type_hints(kind, include_extras=False)
    return kind(**{name: convert(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the type `hint`; a ValueError that begins with `where` if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is typing.Literal:
        for choice in arguments:
            if type(choice) is type(value) and choice == value:
                return choice
        raise ValueError(f"{where} is {_short(value)}, must be one of {', '.join(map(repr, arguments))}")
    if dataclasses.is_dataclass(hint):
        return restore(hint, value, where)
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_elements(origin, arguments, value, where))
    if origin is dict and isinstance(value, dict) and arguments[0] is str:
        return {name: convert(arguments[1], one, f"{where}[{_short(name)}]") for name, one in value.items()}
    return _scalar(hint, value, where)


def bounded(config: Any) -> None:
    """Checks what types do not say: numbers are finite, and whole ones have 32 bits, as on the device.

    Raises:
      ValueError: one is not, by its flag.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            bounded(value)
        for number in value if isinstance(value, tuple | list) else (value,):
            flag = f"--{field.name.replace('_', '-')} {number}"
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{flag}: must be finite")
            if isinstance(number, int) and abs(number) >= 2**31:
                raise ValueError(f"{flag}: must be below 2147483648")


def _union(options: tuple, value: Any, where: str) -> Any:
    exact = [option for option in options if option is type(value)]  # 1 is an int where there are ints, else a float
    for option in (*exact, *options):
        try:
            return convert(option, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where} is {_short(value)}, must be {' or '.join(map(_name, options))}")


def _elements(origin: Any, arguments: tuple, values: list, where: str) -> list:
    kinds = arguments
    if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
        kinds = (arguments[0],) * len(values)
    if len(values) != len(kinds):
        raise ValueError(f"{where} has {len(values)} values, must have {len(kinds)}")
    return [convert(kind, value, f"{where}[{i}]") for i, (kind, value) in enumerate(zip(kinds, values, strict=True))]


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint in (None, types.NoneType) and value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and (not math.isfinite(value) if isinstance(value, float) else abs(value) > LARGEST):
        raise ValueError(f"{where} is {_short(value)}, must be a finite number of at most 64 bits")
    if hint is float and number:
        return float(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    if hint is pathlib.Path and isinstance(value, str) and "\0" not in value:
        return pathlib.Path(value)
    raise ValueError(f"{where} is {_short(value)}, must be {_name(hint)}")


def _name(hint: Any) -> str:
    names = {None: "null", types.NoneType: "null", tuple: "a list", pathlib.Path: "a path"}
    if typing.get_origin(hint) in (tuple, list):
        return "a list"
    return names.get(hint) or getattr(hint, "__name__", str(hint))


def _short(value: Any) -> str:
    return "null" if value is None else reprlib.repr(value)
