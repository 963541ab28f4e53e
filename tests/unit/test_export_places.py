"""Where exports go: what may be replaced, what is refused, and what a failure leaves behind."""

import errno
from pathlib import Path

import pytest

from tests.unit.exported import export, finished
from zo_core import runs
from zo_core.artifacts.place import check_place, placed, prepare
from zo_core.errors import UserError
from zo_core.jobs import ExportJob
from zo_core.models.catalog import DEMO_PATH
from zo_core.recipes import export_model
from zo_core.runs import Run
from zo_core.settings import settings

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture(scope="module")
def tuned(own_store: None) -> dict[str, Run]:
    """A finished run of each of two scopes."""
    return {scope: finished(scope) for scope in ("layer:3", "lora:3")}


def test_only_an_earlier_export_is_replaced(tuned: dict[str, Run], tmp_path: Path) -> None:
    run = tuned["lora:3"]
    folder = tmp_path / "adapter"
    folder.mkdir()
    first = export(run, "adapter", folder)  # empty
    again = export(run, "adapter", folder)
    assert (
        first["sha256"]["adapter_model.safetensors"] == again["sha256"]["adapter_model.safetensors"]
    )
    with pytest.raises(UserError, match="no earlier export of form model alone"):
        export(run, "model", folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export(run, "adapter", folder)
    export(run, "adapter", folder, force=True)
    (aside,) = tmp_path.glob("adapter.before-*")
    assert (aside / "notes.txt").read_text() == "mine"
    assert not (folder / "notes.txt").exists()

    for form, name in (("tensors", "t.safetensors"), ("ledger", "l.gz")):
        out = tmp_path / name
        export(run, form, out)
        export(run, form, out)
        out.write_text("mine")
        with pytest.raises(UserError, match=f"is no export of form {form}"):
            export(run, form, out)
        assert out.read_text() == "mine"
        export(run, form, out, force=True)
    (tmp_path / "u.manifest.json").write_text("{}")
    with pytest.raises(UserError, match="the manifest would replace"):
        export(run, "tensors", tmp_path / "u.safetensors")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_paths_that_cannot_be_used(tuned: dict[str, Run], tmp_path: Path) -> None:
    run = tuned["lora:3"]
    (tmp_path / "file").write_text("")
    for out, form, words in (
        (tmp_path / "no" / "x", "tensors", "does not exist: make it first"),
        (tmp_path, "ledger", "is a folder: name a file for form ledger"),
        (tmp_path / "file", "model", "is a file: name a folder for form model"),
        (DEMO_PATH / "tuned", "model", "belongs to the base model"),
        (DEMO_PATH.parent, "model", "belongs to the base model"),
        (run.path, "model", "belongs to the run store"),
        (settings().cache_dir, "adapter", "belongs to the run store"),
        (tmp_path / ("x" * 300), "tensors", "File name too long"),
        (Path("/dev/null"), "tensors", "is a device or a pipe"),
    ):
        with pytest.raises(UserError, match=words):
            check_place(out, form, True, DEMO_PATH)  # type: ignore[arg-type]


def test_a_place_that_cannot_be_written_is_a_sentence(
    tuned: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    place = check_place(tmp_path / "a", "adapter", force=False)
    with (
        pytest.raises(UserError, match="cannot be written .Permission denied."),
        placed(place, "x"),
    ):
        pytest.fail("it was written to")


def test_an_export_without_a_path_is_in_the_run(tuned: dict[str, Run]) -> None:
    run = tuned["lora:3"]
    out = Path(export(run, "adapter")["out"])
    assert out.parent == run.path / "exports"
    assert prepare(ExportJob(run=run.run_id, form="adapter"))[1].out == out, "may be replaced"
    assert b"exports/" not in run.zip_bytes()


@pytest.mark.parametrize("form", ["model", "tensors"])
def test_a_full_disk_leaves_what_was_there(
    tuned: dict[str, Run], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tuned["layer:3"], tmp_path / "out"
    export(run, form, out)
    kept = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if form == "model":
            patch.setattr(export_model, "_save", full)
        else:
            patch.setattr("zo_core.recipes.export.write_manifest", full)
        with pytest.raises(UserError, match="disk of .* is full: free some space"):
            export(run, form, out)
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == kept
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_a_killed_export_left_is_swept(tuned: dict[str, Run], tmp_path: Path) -> None:
    run, out = tuned["lora:3"], tmp_path / "a"
    dead, alive = (runs.create(ExportJob(run=run.run_id), runs.Process.current()) for _ in "12")
    dead.update(state="cancelled")
    for made in (dead, alive):
        (tmp_path / f".a.{made.run_id}.partial").mkdir()
    export(run, "adapter", out)
    assert {p.name for p in tmp_path.iterdir()} == {"a", f".a.{alive.run_id}.partial"}
    alive.update(state="cancelled")
