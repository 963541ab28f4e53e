"""Probe: perturbation sensitivity layer by layer; tables grow while it runs."""

import math
import time

import pandas as pd

from zo_core.analysis.sensitivity import ProbeSettings, probe_layer, summarise
from zo_core.errors import UserError
from zo_core.jobs import ProbeJob
from zo_core.models import resident
from zo_core.models.catalog import describe
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.runs import Run, to_json
from zo_core.tasks.data import load_job_task
from zo_core.tasks.scoring import task_loss
from zo_core.tasks.templates import encode_rows
from zo_core.zo.path import choose_forward
from zo_core.zo.scope import check_layer
from zo_core.zo.trainer import batch_indices


def run_probe(job: ProbeJob, run: Run, context: JobContext) -> None:
    """Probe the layers of a model on one batch of a task."""
    data = load_job_task(job, dev_examples=0)
    count = describe(job.model, job.revision).n_layers
    layers = list(range(count)) if job.layers is None else job.layers
    check_layer(layers[-1], count, job.model)
    loaded = resident.acquire(job, context.log)
    indices = batch_indices(job.seed, 1, len(data.train), job.batch_size)
    rows = [data.train[i] for i in indices]
    examples = encode_rows(data.task, rows, loaded.tokenizer, loaded.context, training=True)
    cut = sum(e.truncated for e in examples)
    if cut:
        context.log(f"{cut} rows are longer than {loaded.context} tokens allow: cut on the left")
    forward, reason = choose_forward(loaded, "auto", 0, examples[:2])
    context.log(f"{forward.name} path: {reason}")
    prepared = forward.prepare(examples)
    base_loss = float(task_loss(forward.logits(prepared), prepared.scored))
    if not math.isfinite(base_loss):
        raise UserError("The loss of the unperturbed model is not finite: use bfloat16 or float32.")

    began = time.perf_counter()
    total, done = len(layers) * job.draws, 0
    settings = ProbeSettings(job.draws, job.eps, job.noise, job.seed)

    def tick() -> None:
        nonlocal done
        done += 1
        context.progress(done, total, f"layer {layers[(done - 1) // job.draws]}")
        context.check_cancelled()

    context.progress(0, total, f"layer {layers[0]}")
    tables: list[pd.DataFrame] = []
    for layer in layers:
        tables.append(probe_layer(loaded, layer, examples, settings, forward.name, tick))
        _write_tables(run, pd.concat(tables, ignore_index=True))
    summary = summarise(pd.concat(tables, ignore_index=True))
    strength = summary[summary["metric"] == "abs_projected_gradient"].dropna(subset="mean")
    strongest = None if strength.empty else int(strength["layer"].iloc[strength["mean"].argmax()])
    facts = {"run_id": run.run_id, "job": job.model_dump(), "base_loss": base_loss}
    run.write_result("provenance.json", to_json(facts | provenance(loaded)))
    run.write_result(
        "summary.json",
        to_json(
            {
                "model": job.model,
                "task": job.task,
                "n_layers": count,
                "layers": layers,
                "draws": job.draws,
                "eps": job.eps,
                "base_loss": base_loss,
                "most_sensitive_layer": strongest,
                "seconds": round(time.perf_counter() - began, 3),
            }
        ),
    )


def _write_tables(run: Run, draws: pd.DataFrame) -> None:
    for name, table in (("draws", draws), ("layers", summarise(draws))):
        run.write_result(f"{name}.parquet", table.to_parquet(index=False))
        run.write_result(f"{name}.csv", table.to_csv(index=False))
