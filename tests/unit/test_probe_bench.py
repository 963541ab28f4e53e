"""The benchmark of a whole probe, on the bundled model and a tiny batch."""

import pytest

from zo_core.bench import probe as bench
from zo_core.errors import UserError


def test_every_layer_is_probed_and_the_weights_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS", 2)
    monkeypatch.setattr(bench, "TOKENS", 6)
    lines: list[str] = []
    found = bench.run_probe_bench("demo", draws=1, device="cpu", say=lines.append)
    assert found["restored"]
    assert found["pairs"] == found["layers"] == len(found["mean_abs_g"]) == len(lines) == 16
    assert all(g > 0 for g in found["mean_abs_g"])
    # 256 channels, 704 neurons: 4 and 3 matrices a block; block k runs for perturbations 0 to k.
    block = 4 * 256 * 256 + 3 * 256 * 704
    assert found["flops"] == 2 * 2 * 2 * 6 * block * sum(range(1, 17))
    assert found["seconds"] >= found["parts"]["probe"]


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(UserError, match="draws: 0"):
        bench.run_probe_bench("demo", draws=0)
    with pytest.raises(UserError, match="shape: 'gpt9' is unknown"):
        bench.run_probe_bench("gpt9", device="cpu")
