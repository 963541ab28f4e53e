"""Command-line options made from a job spec, so that both always have the same fields."""

import inspect
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from zo_core.jobs import KINDS


def _metavar(annotation: Any) -> str:
    """How a field's type is written in the help."""
    if get_origin(annotation) in {Union, types.UnionType}:
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is list:
        (item,) = get_args(annotation)
        return ",".join(get_args(item)) or {int: "0,3,8", float: "1e-4,1e-3,1e-2"}[item]
    if get_origin(annotation) is dict:
        return "0=terrible,1=great"
    return {int: "N", float: "X", str: "TEXT"}.get(annotation, "PATH")


def with_job_options(kind: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for every field of a job spec.

    The command is called with its own options and ``fields``: the given ones as a dict of strings,
    which the spec parses and checks, so that the page and the command line say the same sentences.
    """
    job: type[BaseModel] = KINDS[kind]
    options = []
    for name, field in job.model_fields.items():
        if name == "kind":
            continue
        shown = None if field.default in (None, []) else str(field.default)
        options.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(
                    None,
                    f"--{name.replace('_', '-')}",
                    help=field.description,
                    metavar=_metavar(field.annotation),
                    show_default=shown or False,
                ),
                annotation=str | None,
            )
        )
    names = [option.name for option in options]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != "fields"]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

        def wrapper(**values: Any) -> None:
            fields: dict[str, Any] = {n: values.pop(n) for n in names}
            given = {n: v for n, v in fields.items() if v is not None}
            if "layers" in given:
                given["layers"] = [part for part in given["layers"].split(",") if part.strip()]
            command(fields={"kind": kind, **given}, **values)

        wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*options, *own]
        )
        wrapper.__annotations__ = {p.name: p.annotation for p in [*options, *own]}
        return wrapper

    return decorate
