"""The bundled model on the CPU, and on the GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from zo_core.jobs import ModelFields
from zo_core.models.load import LoadedModel, load
from zo_core.settings import settings as app_settings
from zo_core.tasks.data import load_task
from zo_core.tasks.templates import Example, encode

# How long a case takes says how busy the machine is.
settings.register_profile("unit", deadline=None)
settings.load_profile("unit")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A run store for the tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app_settings(), "cache_dir", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session", params=DEVICES)
def demo(request: pytest.FixtureRequest) -> LoadedModel:
    """The bundled model in float32."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return load(ModelFields(device=request.param, dtype="float32"))


@pytest.fixture(scope="session")
def review_examples(demo: LoadedModel) -> list[Example]:
    """The first 40 training rows of the bundled task."""
    data = load_task("reviews", dev_examples=0)
    return [encode(data.task, row, demo.tokenizer, demo.context) for row in data.train[:40]]
