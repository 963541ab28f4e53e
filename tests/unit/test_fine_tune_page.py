"""The fine-tune form: simple at first, every setting under Advanced, and its command line."""

from pathlib import Path

from tests.unit.test_rooms import run_python


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
