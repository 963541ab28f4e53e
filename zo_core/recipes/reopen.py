"""A tuning run's scope on its base model again, for jobs that come after the run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models.load import LoadedModel
from zo_core.recipes.scope import acquire
from zo_core.run_jobs import Device
from zo_core.scope_spec import parse
from zo_core.zo.fingerprint import base_weights
from zo_core.zo.scope import TunedScope
from zo_core.zo.scopes import select
from zo_core.zo.trainer import make_scope


@contextmanager
def reopened(
    tune: TuneJob, device: Device, base: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[tuple[LoadedModel, TunedScope]]:
    """The model and the scope at its base weights; both are as they were afterwards.

    Args:
        tune: the run's spec.
        device: where to load the model.
        base: see :func:`zo_core.artifacts.source.base_of`.
        say: receives a line when something slow happens.

    Raises:
        UserError: the base weights are others now, or the model cannot be loaded.
    """
    # dtype auto means another one on another device: the base weights would differ.
    changes = {"device": device, "dtype": base.get("dtype") or tune.dtype}
    loaded = acquire(tune.model_copy(update=changes), say)
    with closing(select(loaded, parse(tune.scope), base.get("dominant_layer"), tune.seed)) as found:
        scope = make_scope(tune, found)
        try:
            if base.get("fingerprint") not in (None, base_weights(loaded, scope)):
                raise UserError(_changed(tune, loaded, str(base.get("device") or "")))
            yield loaded, scope
        finally:
            scope.close()


def _changed(tune: TuneJob, loaded: LoadedModel, device: str) -> str:
    # Sums on another kind of device may differ in the last digit that is looked at.
    here = loaded.device.type
    other = f", or try device {device}" if device and device != here else ""
    return (
        f"model: the weights of {tune.model} are not those the run began with: restore them, or "
        f"name the right revision or folder{other}."
    )
