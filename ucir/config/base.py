"""What every block of params.yaml is made of, and how its faults are told."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ucir.errors import UserError, nearest

PARAMS_FILE = "params.yaml"
ONE_PART = "all"
"""The part of a study that is not divided."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


def known_setting(name: str) -> str:
    """The name, if it is one of :mod:`ucir.data.splits`.

    Raises:
        ValueError: it is not.
    """
    if not re.fullmatch(r"closed|partial|open|tailed-[1-9][0-9]{0,3}", name):
        raise ValueError(
            f"setting {name[:40]!r} is unknown: closed, partial, open, or tailed-10 for class sizes up to "
            "10 : 1 (at most tailed-9999)"
        )
    return name


Setting = Annotated[str, AfterValidator(known_setting)]

T = TypeVar("T")


def distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    """The values, if none stands twice.

    Raises:
        ValueError: one does.
    """
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} stands there {values.count(value)} times")
    return values


Distinct = AfterValidator(distinct)
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]  # what numpy takes
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), Distinct]


class Block(BaseModel):
    """A block of params.yaml: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


B = TypeVar("B", bound=BaseModel)


def checked(model: type[B], raw: object, file: str, block: str = "") -> B:
    """``model`` from plain data; every fault named by file, block and field in one line.

    Raises:
        UserError: one clause for each unknown key, missing key or value out of range.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        entries = error.errors()
        # a list whose only item is refused is empty for pydantic, which would say so as well
        empty = {e["loc"] for e in entries if e["type"] == "too_short"} & {e["loc"][:-1] for e in entries}
        worth_telling = [e for e in entries if e["type"] != "too_short" or e["loc"] not in empty]
        faults = "; ".join(_fault(model, entry, block) for entry in worth_telling)
        raise UserError(f"{file}: {faults}") from None


def _fault(model: type[BaseModel], entry: Any, block: str) -> str:
    location = [str(part) for part in entry["loc"]]
    if location[:1] == ["studies"] and location[2:4] == ["parts", ONE_PART]:
        del location[2:4]  # which the file does not have
    field = ".".join([*([block] if block else []), *location])
    if entry["type"] == "extra_forbidden":
        known = _known_keys(model, entry["loc"][:-1])
        return f"{field}: unknown key; {nearest(location[-1], known)}"
    if entry["type"] == "missing":
        remedy = ": `uv run ucir study NAME` writes it" if field == "study" else ""
        return f"{field}: missing{remedy}"
    message = entry["msg"].removeprefix("Value error, ").replace("valid tuple", "list, e.g. [1, 2]")
    if entry["type"] == "value_error":  # our own checks name the field and the remedy themselves
        return f"{field}: {message}" if field else message
    return f"{field} = {entry['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Keys of the block at ``location``: walks through models, dicts and optional blocks."""
    from typing import get_args

    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field else None
        else:  # dict[key, block], Annotated or block | None
            model = get_args(model)[-1] if get_args(model) else None
        blocks = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)]
        if blocks and not (isinstance(model, type) and issubclass(model, BaseModel)):
            origin_is_dict = getattr(model, "__origin__", None) is dict
            model = model if origin_is_dict else blocks[0]
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []
