"""Bad input on the command line: exit code 2 and one sentence, before anything starts."""

import json
import sys
from pathlib import Path

import pytest

from zo_core.cli import main
from zo_core.settings import settings

REFUSED = [
    (("tune", "--scope", "layer:99"), "has layers 0 to 15"),
    (("probe", "--layers", "2,16"), "has layers 0 to 15"),
    (("scan", "--model", "/nowhere/at/all"), "no folder '/nowhere/at/all' here"),
    (("tune", "--task", "sst3"), "'sst3' is unknown: choose one of reviews, sst2"),
    (("tune", "--eps", 0), "eps is '0': input should be greater than or equal to 0.00000001"),
    (("tune", "--steps", -1), "steps is '-1': input should be greater than or equal to 1"),
    (("tune", "--scope", "layer:x"), "choose full, layer:<k>, layers:<list>"),
    (("probe", "--layers", "1,b"), "layers is 'b': input should be a valid integer"),
    (("scan", "--text", "prompt"), "prompt is empty"),
    (("scan", "--model", " "), "give demo, an existing folder, or an id such as"),
    (("tune", "--resume", "20250101-000000-tune-abcdef"), "No run '20250101-000000-tune-abcdef'"),
    (("tune", "--resume", "../x"), "No run '../x'"),
    (
        ("tune", "--resume", "20250101-000000-tune-abcdef", "--lr", 1),
        "--resume keeps the run's own settings: leave out --lr",
    ),
    (("scan", "--model", "x" * 300), "and it is no hub id"),
    (("compare",), "Name a preset (quick, paper, falsify, layers, scopes) or a YAML file"),
    (
        (
            "compare",
            "quickly",
        ),
        "'quickly' is no preset and no file",
    ),
    (("compare", "quick", "--seeds", "0,x"), "seeds is 'x': input should be a valid integer"),
    (
        ("compare", "quick", "--steps", 0),
        "steps is '0': input should be greater than or equal to 1",
    ),
    (("compare", "quick", "--task", "sst2", "--data-dir", "/no"), "/no has no sst2/train.jsonl"),
    (("compare", "quick", "--task", "sst3"), "'sst3' is unknown: choose one of reviews, sst2"),
    (("compare", "quick", "--set", "batch_size"), "write --set batch_size=4"),
    (("compare", "quick", "--set", "colour=red"), "colour is not a field"),
    (("compare", "quick", "--set", "alpha=2"), "alpha is '2': input should be less than 0.5"),
    (("compare", "--resume", "nothing"), "No comparison 'nothing'"),
    (("compare", "quick", "--resume", "x", "--seeds", "1"), "leave out quick, seeds"),
    (("compare", "--cancel", "nothing"), "No comparison 'nothing'"),
    (("compare", "--report", "nothing", "--out", "/tmp"), "No comparison 'nothing'"),
    (("compare", "quick", "--cancel", "x"), "--cancel ID stands alone"),
    (("compare", "layers", "--model", "/nowhere/at/all"), "no folder '/nowhere/at/all' here"),
]


def refused(arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Run a command, which exits with 2 and leaves nothing."""
    monkeypatch.setattr(settings(), "cache_dir", cache)
    monkeypatch.setattr(sys, "argv", ["zo_core", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert not list(cache.iterdir()), "nothing was made"


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_a_sentence_and_exit_code_2(
    arguments: tuple[object, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused((*arguments, "--json"), monkeypatch, tmp_path)
    shown = capsys.readouterr()
    error = json.loads(shown.out.splitlines()[-1])["error"]
    assert words in error
    assert f"Error: {error}" in shown.err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("tune", "--learning-rate", 1), "--learning-rate"), (("sweep",), "sweep")],
)
def test_unknown_option_and_command(
    arguments: tuple[object, ...],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(arguments, monkeypatch, tmp_path)
    assert word in capsys.readouterr().err
