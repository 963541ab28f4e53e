"""The fine-tune form: simple at first, every setting under Advanced, and its command line."""

from pathlib import Path

import pytest

from tests.unit.test_rooms import run_python
from zo_core import runs
from zo_core.artifacts.raw import Stored, build_header
from zo_core.jobs import TuneJob
from zo_core.settings import settings


def test_advanced_settings_and_other_scopes(tmp_path: Path) -> None:
    """What is chosen shows in the command line; what does not fit is one sentence."""
    code = """
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60).run()
        app.switch_page("pages/fine_tune.py").run()
        print(app.code[0].value)
        app.segmented_control(key="tune_scope").set_value("other").run()
        print(app.code[0].value)
        app.text_input(key="tune_scope_text").set_value("channels:auto:top1%").run()
        app.selectbox(key="tune_optimizer").set_value("momentum").run()
        app.number_input(key="tune_momentum").set_value(0.5).run()
        app.number_input(key="tune_directions").set_value(4).run()
        app.selectbox(key="tune_noise").set_value("sphere").run()
        print(app.code[0].value)
        app.selectbox(key="tune_optimizer").set_value("adamw").run()
        print(app.code[0].value)
        app.text_input(key="tune_scope_text").set_value("layer:99").run()
        print(app.warning[0].value)
        app.text_input(key="tune_scope_text").set_value("layers").run()
        print(app.warning[0].value)
        app.text_input(key="tune_scope_text").set_value("prefix").run()
        app.selectbox(key="tune_path").set_value("fast").run()
        print(app.warning[0].value)
        assert not app.exception, app.exception
    """
    lines = run_python(code, tmp_path).strip().splitlines()
    start = "python -m zo_core tune --model demo"
    assert lines[0] == start
    assert lines[1] == f"{start} --scope attention:auto"
    momentum = "--optimizer momentum --momentum 0.5 --directions 4"
    assert lines[2] == f"{start} --noise sphere --scope channels:auto:top1% {momentum}"
    assert lines[3] == f"{start} --scope channels:auto:top1% --optimizer adamw"
    assert "there is no layer 99" in lines[4]
    assert "choose full" in lines[5]
    assert "path fast is not possible" in lines[6]


def test_an_ended_run_offers_its_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and ledger directly, folders as commands and, being small, as archives."""
    monkeypatch.setattr(settings(), "cache_dir", tmp_path)
    run = runs.create(TuneJob(scope="lora:3", steps=2), None)
    entry = Stored("F32", (2,), 0, 8)
    head = build_header({"step": "1"}, {"a.lora_A.default.weight": entry})
    (run.path / "checkpoint.safetensors").write_bytes(head + bytes(8))
    step = {"kind": "step", "step": 1, "loss": 1.0, "g": [1.0], "lr": 1e-3, "seconds": 1.0}
    run.append_metrics(step | {"forward_passes": 2})
    run.update(state="cancelled", step=1, total=2)
    code = f"""
        import sys
        from streamlit.testing.v1 import AppTest
        app = AppTest.from_file("app.py", default_timeout=60)
        app.query_params["run"] = {run.run_id!r}
        app.run()
        app.switch_page("pages/fine_tune.py").run()
        assert not app.exception, app.exception
        print([c.value for c in app.code if " export " in c.value])
        print([b.key for b in app.button if b.key.startswith("make_")])
        print([b.proto.label for b in app.get("download_button")])
        print([c.value for c in app.caption if "step 1 of 2, cancelled" in c.value] != [])
        print("torch" in sys.modules)
    """
    lines = run_python(code, tmp_path).strip().splitlines()
    command = f"python -m zo_core export {run.run_id} --form"
    assert lines[0] == str(
        [f"{command} {form} --out {run.run_id}-{form}" for form in ("model", "adapter")]
    )
    assert lines[1] == "['make_model', 'make_adapter']"
    assert lines[2] == "['metrics.csv', 'Tuned tensors', 'Ledger', 'Figure (HTML)']"
    assert lines[3:] == ["True", "False"]
