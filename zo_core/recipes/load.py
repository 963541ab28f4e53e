"""Load a model and keep it resident; unload everything."""

from zo_core.jobs import LoadJob, UnloadJob
from zo_core.models import resident
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.runs import Run, to_json


def run_load(job: LoadJob, run: Run, context: JobContext) -> None:
    """Make the model resident."""
    context.progress(0, 1, f"Loading {job.model}")
    loaded = resident.acquire(job, context.log)
    run.write_result("summary.json", to_json(provenance(loaded)))
    context.progress(1, 1, f"{job.model} is resident on {loaded.device}")


def run_unload(_job: UnloadJob, _run: Run, context: JobContext) -> None:
    """Release every resident model."""
    count = resident.clear()
    context.progress(1, 1, f"{count} model{'s' * (count != 1)} unloaded")
