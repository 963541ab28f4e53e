"""Where a comparison's spec comes from: a preset's name or a YAML file, and what is put over it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from zo_core.compare.presets import PRESETS
from zo_core.compare.spec import COMMON, CompareSpec
from zo_core.errors import UserError
from zo_core.jobs import explain


def read_fields(
    source: str, model: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """The fields of a preset, or of a YAML file.

    Args:
        source: name of a preset, or path of a file.
        model: the model that presets with one arm a layer are made for; none: demo.
        revision: of that model.

    Raises:
        UserError: it is neither, or the file cannot be read.
    """
    if source in PRESETS:
        return PRESETS[source](model or "demo", revision)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(
            f"{source!r} is no preset and no file: choose {', '.join(PRESETS)}, or give the path "
            "of a YAML file (docs/compare.md)."
        )
    try:
        fields = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read as YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds no fields: write `arms:` and so on (docs/compare.md).")
    return {str(name): value for name, value in fields.items()}


def make_spec(fields: dict[str, Any], over: dict[str, Any]) -> CompareSpec:
    """The spec of fields with others put over them.

    A budget in ``over`` replaces the one in ``fields``, in whichever unit.

    Raises:
        UserError: a field is wrong.
    """
    if {"steps", "forward_passes"} & over.keys():
        fields = {n: v for n, v in fields.items() if n not in ("steps", "forward_passes")}
    common = {**(fields.get("common") or {}), **{n: v for n, v in over.items() if n in COMMON}}
    rest = {n: v for n, v in over.items() if n not in COMMON}
    flat = {n: v for n, v in fields.items() if n != "common" and n not in common}
    try:
        return CompareSpec.model_validate(flat | {"common": common} | rest)
    except ValidationError as error:
        raise UserError(explain(error)) from error
