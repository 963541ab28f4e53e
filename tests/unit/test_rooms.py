"""The house's walls: pages never load torch, the core never knows Streamlit, rooms keep apart."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from zo_core.settings import ROOT

HEAVY = {"torch", "transformers", "distributed", "datasets", "accelerate"}
THREAD = {"distributed"}
"""Imported by the engine's thread once the app runs; never while a page waits."""
PAGES = sorted((ROOT / "pages").glob("*.py"))
WEB = [ROOT / "app.py", *sorted((ROOT / "pages").rglob("*.py"))]
CORE = sorted((ROOT / "zo_core").rglob("*.py"))


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, everywhere: bool) -> Iterator[str]:
    """Modules that a file imports: at its top level, or anywhere in it; not for type checking."""
    tree = ast.parse(file.read_text(), str(file))
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in skipped or (not everywhere and id(node) in deferred):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def ours() -> dict[str, Path]:
    """Every module of the project, by name."""
    return {name_of(file): file for file in [*WEB, *CORE]}


def reached_from(files: list[Path]) -> dict[str, str]:
    """Every module that importing these files imports, and the file of ours that asks for it."""
    seen: dict[str, str] = {}
    waiting = [(name_of(file), "") for file in files]
    while waiting:
        name, by = waiting.pop()
        parts = name.split(".")
        # Importing a.b.c runs a and a.b as well.
        for module in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
            if module in seen:
                continue
            seen[module] = by
            if module in ours():
                found = imports_of(ours()[module], everywhere=False)
                waiting += [(other, module) for other in found]
    return seen


def test_import_graph_of_the_pages_has_nothing_heavy() -> None:
    reached = reached_from(WEB)
    assert "zo_core.backend" in reached, "the graph is followed"
    assert "zo_core.runs" in reached
    assert {m: by for m, by in reached.items() if m in HEAVY} == {}


def test_pages_import_only_their_rooms() -> None:
    """design.md, "Rooms": what `app.py` and `pages/` may import of the core."""
    allowed = re.compile(
        r"zo_core(\.(runs|backend|jobs|scope_spec|plots|export|artifacts|reports|settings|errors)(\..*)?"
        r"|\.analysis(\.(outliers|known)(\..*)?)?|\.models(\.(catalog|memory)(\..*)?)?"
        r"|\.tasks(\.catalog(\..*)?)?"
        # What the command line of a comparison computes is read here, not computed.
        r"|\.compare(\.(spec|presets|files|store|status|detach|claims|power|reader|markdown)"
        r"(\..*)?)?|\.reports(\..*)?)?"
    )
    for file in WEB:
        for module in imports_of(file, everywhere=True):
            assert module.split(".")[0] not in HEAVY, (file, module)
            if module.split(".")[0] == "zo_core":
                assert allowed.fullmatch(module), f"{file} imports {module}"


def test_core_knows_no_streamlit() -> None:
    for file in CORE:
        for module in imports_of(file, everywhere=True):
            assert module.split(".")[0] not in {"streamlit", "pages", "app"}, (file, module)


def test_lower_rooms_do_not_import_upper_ones() -> None:
    """Not even inside functions."""
    below = {
        "zo_core.settings": set(),
        "zo_core.errors": set(),
        "zo_core.upload": set(),
        "zo_core.scope_spec": set(),
        "zo_core.run_jobs": set(),
        "zo_core.own_spec": set(),
        "zo_core.learning_rates": set(),
        "zo_core.jobs": {
            *("settings", "errors", "scope_spec", "own_spec", "suffix_spec", "run_jobs"),
            "learning_rates",
        },
        "zo_core.runs": {"settings", "errors", "jobs"},
        "zo_core.models": {"settings", "errors", "jobs", "models"},
        "zo_core.tasks": {"settings", "errors", "jobs", "models", "tasks", "upload"},
        "zo_core.analysis": {"settings", "errors", "jobs", "models", "tasks", "analysis", "zo"},
        "zo_core.zo": {
            *("settings", "errors", "jobs", "models", "tasks", "zo", "runs", "scope_spec"),
            "upload",
        },
        "zo_core.plots": {"plots", "settings", "errors", "jobs", "runs", "analysis"},
        "zo_core.compare": {
            *("settings", "errors", "jobs", "scope_spec", "runs", "backend", "preflight"),
            *("models", "export", "compare"),
        },
        "zo_core.reports": {
            *("settings", "errors", "jobs", "runs", "analysis", "plots", "export", "compare"),
            "reports",
        },
        "zo_core.export": {"settings", "errors", "jobs", "runs"},
        "zo_core.artifacts": {
            *("settings", "errors", "jobs", "run_jobs", "scope_spec", "runs", "failures"),
            *("models", "tasks", "artifacts"),
        },
    }
    for file in CORE:
        room = ".".join(name_of(file).split(".")[:2])
        for module in imports_of(file, everywhere=True):
            parts = module.split(".")
            if room in below and parts[0] == "zo_core" and len(parts) > 1:
                assert parts[1] in below[room], f"{file} imports {module}"


def run_python(code: str, cache_dir: Path) -> str:
    """Output of a fresh interpreter; its engine address leads nowhere, so that none is started."""
    environment = os.environ | {
        "ZO_CACHE_DIR": str(cache_dir),
        "ZO_BACKEND": "tcp://127.0.0.1:9",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_page_runs_without_torch(tmp_path: Path) -> None:
    """Each page is really run, empty store and all: what it imports on the way counts too."""
    code = f"""
        import sys
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        for page in {[f"pages/{p.name}" for p in PAGES]!r}:
            app.switch_page(page).run()
            errors = [e.value for e in app.exception]
            print(page, len(app.main) > 0, errors, sorted({HEAVY - THREAD!r} & set(sys.modules)))
    """
    lines = run_python(code, tmp_path).strip().splitlines()
    assert len(lines) == len(PAGES) >= 5
    for page, line in zip(PAGES, lines, strict=True):
        assert line == f"pages/{page.name} True [] []"


@pytest.mark.parametrize(
    "module",
    [
        "zo_core.backend",
        "zo_core.cli",
        "zo_core.plots",
        "zo_core.export",
        "zo_core.models.catalog",
        "zo_core.artifacts.place",
        "zo_core.artifacts.card",
        "zo_core.analysis.outliers",
        "zo_core.analysis.known",
        "zo_core.reports.scan",
        "zo_core.reports.images",
        "zo_core.compare.driver",
        "zo_core.compare.tables",
    ],
)
def test_light_modules_stay_light(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(sorted(({HEAVY!r} | {{'streamlit'}}) & set(sys.modules)))"
    assert run_python(code, tmp_path).strip() == "[]"


def test_a_command_waits_for_no_tables(tmp_path: Path) -> None:
    """Pandas costs a command more than all else that it imports to start."""
    code = "import sys, zo_core.cli; print('pandas' in sys.modules)"
    assert run_python(code, tmp_path).strip() == "False"


def test_no_file_is_too_long_to_read() -> None:
    """design.md: about 400 lines at most."""
    for file in [*WEB, *CORE]:
        assert len(file.read_text().splitlines()) <= 400, file
