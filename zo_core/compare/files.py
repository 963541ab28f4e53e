"""Where a comparison's spec comes from: a preset's name or YAML, and what is put over it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from zo_core.compare.presets import PRESETS
from zo_core.compare.spec import COMMON, CompareSpec
from zo_core.errors import UserError
from zo_core.jobs import explain
from zo_core.preflight import absolute, check, check_folder

OPTIONS = {
    "tasks": "--task",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in ("seeds", "steps", "forward_passes", "search_steps", "data_dir")
    },
    **{name: f"--{name}" for name in ("model", "device", "dtype")},
}
"""Fields that ``compare`` has an option for."""
PLACES = ("model", "data_dir", "task_file")


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
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}.") from error
    return parse_fields(text, str(path))


class _Loader(yaml.SafeLoader):
    """Without aliases: a few hundred bytes of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read here")
        return super().compose_node(parent, index)


def parse_fields(text: str, name: str) -> dict[str, Any]:
    """The fields that a YAML text holds; ``name`` is what errors call it.

    Raises:
        UserError: it is no YAML, or no mapping.
    """
    try:
        fields = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"{name} cannot be read as YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{name} holds no fields: write `arms:` and so on (docs/compare.md).")
    return {str(name): value for name, value in fields.items()}


def make_spec(fields: dict[str, Any], over: dict[str, Any]) -> CompareSpec:
    """The spec of fields with others put over them.

    A budget in ``over`` replaces the one in ``fields``, in whichever unit.

    Raises:
        UserError: a field is wrong.
    """
    if not isinstance(fields.get("common") or {}, dict):
        raise UserError("common holds no fields: write `common: {batch_size: 4}`.")
    if {"steps", "forward_passes"} & over.keys():
        fields = {n: v for n, v in fields.items() if n not in ("steps", "forward_passes")}
    common = {**(fields.get("common") or {}), **{n: v for n, v in over.items() if n in COMMON}}
    rest = {n: v for n, v in over.items() if n not in COMMON}
    flat = {n: v for n, v in fields.items() if n != "common" and n not in common}
    try:
        return CompareSpec.model_validate(flat | {"common": common} | rest)
    except ValidationError as error:
        raise UserError(explain(error)) from error


def as_yaml(spec: CompareSpec) -> str:
    """A spec as a file that :func:`read_fields` reads: what differs from the defaults."""
    fields: dict[str, Any] = {"title": spec.title} if spec.title else {}
    kept = spec.model_dump(mode="json", exclude_defaults=True, exclude={"title", "arms", "common"})
    fields |= {"tasks": spec.tasks, "seeds": spec.seeds} | kept | _plain(spec.common)
    text = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=96)
    arms = []
    for arm in spec.arms:
        flat = arm.model_dump(mode="json", exclude_defaults=True, exclude={"settings"})
        arms.append(flat | _plain(arm.settings))
    return text + "arms:\n" + "".join(f"  - {_one_line(arm)}\n" for arm in arms)


def command_of(source: str, fields: Mapping[str, Any], over: Mapping[str, Any]) -> str:
    """The command line that begins the comparison of a preset or file.

    Args:
        source: name of the preset, or the file.
        fields: what the source says.
        over: what is put over it; what the source says anyway is left out.
    """
    words = ["python", "-m", "zo_core", "compare", source]
    defaults = {n: field.default for n, field in CompareSpec.model_fields.items()}
    for name, value in over.items():
        if value == (defaults | dict(fields)).get(name):
            continue
        text = ",".join(str(v) for v in value) if isinstance(value, list) else str(value)
        if name in OPTIONS:
            words += [OPTIONS[name], text]
        else:
            words += ["--set", f"{name}={text}"]
    return shlex.join(words)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def _one_line(arm: dict[str, Any]) -> str:
    return yaml.safe_dump(arm, sort_keys=False, default_flow_style=True, width=float("inf")).strip()


def placed(spec: CompareSpec) -> CompareSpec:
    """The same comparison with absolute paths, checked against the tasks and the model.

    The worker may have another working directory, and another ``ZO_DATA_DIR``.

    Raises:
        UserError: an unknown task, a folder without its rows, or a layer the model does not have.
    """
    places = [absolute(spec.common | {"task": one}) for one in spec.tasks]
    found = {n: str(v) for fields in places for n, v in fields.items() if n in PLACES}
    spec = make_spec(spec.model_dump(), found)
    for one in spec.tasks:
        check_folder(spec.probe_job(one))
        for arm in spec.arms:
            if arm.tunes:
                for seed in spec.seeds if "{seed}" in arm.scope else spec.seeds[:1]:
                    check(spec.job(arm, one, seed))
    return spec
