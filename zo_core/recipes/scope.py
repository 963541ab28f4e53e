"""What tune and replay share: the model in the right precision, and the layer that auto means."""

from collections.abc import Callable

from zo_core.errors import UserError
from zo_core.jobs import TuneJob
from zo_core.models import resident
from zo_core.models.catalog import describe
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.recipes.scan import find_first_outlier_layer
from zo_core.runs import Run
from zo_core.scope_spec import AUTO, ScopeSpec
from zo_core.zo.scope import check_layer


def acquire(job: TuneJob, say: Callable[[str], None]) -> LoadedModel:
    """The job's model; precision fp32 loads float32 weights whatever the device."""
    fields = job.model_copy(update={"dtype": "float32"}) if job.precision == "fp32" else job
    return resident.acquire(fields, say)


def check_layers(spec: ScopeSpec, job: TuneJob) -> None:
    """Look at the layers that a scope numbers, before anything is loaded.

    Raises:
        UserError: the model has no such layer.
    """
    for layer in spec.numbers:
        check_layer(layer, describe(job.model, job.revision).n_layers, job.model)


def dominant_layer(
    job: TuneJob, spec: ScopeSpec, run: Run, loaded: LoadedModel, context: JobContext
) -> int | None:
    """The layer that the job's rule names; None if the scope does not ask, or it names none.

    A run that has looked before keeps its layer.

    Raises:
        UserError: the scope says auto, and the rule names none.
    """
    if not spec.needs_rule:
        return None
    known = run.status().details.get("dominant_layer")
    if known is not None:
        return known
    context.progress(0, job.steps, "looking for the first outlier layer")
    verdict = find_first_outlier_layer(loaded, job.rule, context)
    if verdict.layer is None and AUTO in spec.layers:
        raise UserError(
            f"scope: the rule {job.rule} names no first outlier layer of {job.model} "
            f"({verdict.reason.rstrip('.')}): choose a layer, for example layer:1, or another rule."
        )
    context.log(f"The rule {job.rule} names layer {verdict.layer}: {verdict.reason}")
    return verdict.layer
