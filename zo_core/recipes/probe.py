"""Probe: perturbation sensitivity layer by layer; tables grow while it runs."""

import math
import time
from typing import Any

import pandas as pd

from zo_core.analysis.ablation import ablation, place_effect
from zo_core.analysis.epsilon import as_facts, linear_ranges
from zo_core.analysis.gradients import distribution
from zo_core.analysis.probe import Probe
from zo_core.analysis.sensitivity import ProbeSettings, summarise
from zo_core.errors import UserError
from zo_core.jobs import ProbeJob
from zo_core.models import resident
from zo_core.models.catalog import describe
from zo_core.models.load import LoadedModel
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.runs import Run, to_json
from zo_core.tasks.data import TaskData, load_job_task
from zo_core.tasks.templates import Example, encode_rows
from zo_core.zo.forward import FastForward
from zo_core.zo.layerwise import LayerwiseBatch
from zo_core.zo.path import choose_forward
from zo_core.zo.reference import ReferenceForward
from zo_core.zo.scope import check_layer
from zo_core.zo.trainer import batch_indices


def run_probe(job: ProbeJob, run: Run, context: JobContext) -> None:
    """Probe the layers of a model on batches of a task."""
    data = load_job_task(job, dev_examples=0)
    if job.batches > 1 and job.batches * job.batch_size > len(data.train):
        raise UserError(
            f"batches: {job.task} has {len(data.train)} training rows, too few for {job.batches} "
            f"different batches of {job.batch_size}: lower batches or batch_size."
        )
    count = describe(job.model, job.revision).n_layers
    layers = list(range(count)) if job.layers is None else job.layers
    check_layer(layers[-1], count, job.model)
    loaded = resident.acquire(job, context.log)
    began = time.perf_counter()
    batches = _batches(job, data, loaded, context)
    base_loss = sum(b.loss for b in batches) / len(batches)
    if not math.isfinite(base_loss):
        raise UserError("The loss of the unperturbed model is not finite: use bfloat16 or float32.")

    settings = ProbeSettings(job.draws, job.eps, job.noise, job.seed, tuple(job.eps_sweep))
    probe = Probe(loaded, batches, layers, settings, job.scalings)
    total, done = probe.pairs, 0

    def tick(layer: int) -> None:
        nonlocal done
        done += 1
        context.progress(done, total, f"layer {layer}")
        context.check_cancelled()

    context.progress(0, total, f"layer {layers[0]}")
    tables = probe.run(tick, lambda: _write_tables(run, probe))
    draws = pd.DataFrame(tables.draws, columns=["layer", "draw", "metric", "value"])
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
                "batches": job.batches,
                "eps": job.eps,
                "base_loss": base_loss,
                "most_sensitive_layer": _largest(draws, "abs_projected_gradient"),
                **_further(probe),
                "forward_passes": 2 * total + len(batches),
                "seconds": round(time.perf_counter() - began, 3),
            }
        ),
    )


def _batches(
    job: ProbeJob, data: TaskData, loaded: LoadedModel, context: JobContext
) -> list[LayerwiseBatch]:
    """The batches of the first steps of a run with this seed, each run once."""
    encoded: list[list[Example]] = []
    for step in range(1, job.batches + 1):
        indices = batch_indices(job.seed, step, len(data.train), job.batch_size)
        rows = [data.train[i] for i in indices]
        encoded.append(
            encode_rows(data.task, rows, loaded.tokenizer, loaded.context, training=True)
        )
    cut = sum(e.truncated for examples in encoded for e in examples)
    if cut:
        context.log(f"{cut} rows are longer than {loaded.context} tokens allow: cut on the left")
    forward, reason = choose_forward(loaded, "auto", 0, encoded[0][:2])
    context.log(f"{forward.name} path: {reason}")
    # One path for all batches: each would keep two perturbed copies of the layer.
    shared = ReferenceForward(loaded) if forward.name == "reference" else FastForward(loaded)
    return [LayerwiseBatch(loaded, examples, shared) for examples in encoded]


def _largest(table: pd.DataFrame, metric: str) -> int | None:
    """The layer with the largest mean of a metric; None where nothing is finite."""
    mean = table[table["metric"] == metric].groupby("layer")["value"].mean().dropna()
    return None if mean.empty else int(mean.idxmax())


def _further(probe: Probe) -> dict[str, Any]:
    """What the analyses that were asked for found."""
    frames = probe.tables.frames()
    facts: dict[str, Any] = {}
    if "sweep" in frames:
        facts |= as_facts(frames["sweep"])
    if "scalings" in frames:
        scaled = frames["scalings"]
        facts["most_sensitive_scaled"] = {
            name: _largest(table, "loss_shift") for name, table in scaled.groupby("scaling")
        } | {"none": _largest(frames["draws"], "loss_shift")}
    if probe.target is not None:
        table = ablation(frames["draws"], frames["scalings"])
        facts |= {"equalised_own_change": probe.target, "place_effect": place_effect(table)}
    return facts


def _write_tables(run: Run, probe: Probe) -> None:
    frames = probe.tables.frames()
    frames["layers"] = summarise(frames["draws"])
    frames["gradients"] = distribution(frames.pop("batches"))
    frames["gradients_by_batch"] = pd.DataFrame(
        probe.tables.batches, columns=["layer", "draw", "batch", "projected_gradient"]
    )
    if "sweep" in frames:
        frames["linear_range"] = linear_ranges(frames["sweep"])
    if "scalings" in frames:
        scaled = frames["scalings"]
        frames["scaled_layers"] = summarise(scaled, ("scaling", "layer", "metric"))
        if (scaled["scaling"] == "output").any():
            frames["ablation"] = ablation(frames["draws"], scaled)
    for name, table in frames.items():
        run.write_result(f"{name}.parquet", table.to_parquet(index=False))
        run.write_result(f"{name}.csv", table.to_csv(index=False))
