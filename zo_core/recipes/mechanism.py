"""Mechanism: who writes and removes massive activations, what attends to them, what they do."""

import time
from typing import Any

import pandas as pd
import torch

from zo_core.analysis.activations import ActivationScan
from zo_core.analysis.interventions import INTERVENTIONS, intervene
from zo_core.analysis.mechanism import Traced, find_sites, massive_tokens, trace
from zo_core.analysis.outliers import first_outlier_layer
from zo_core.analysis.recording import Recording
from zo_core.analysis.sinks import sink_shares, without_sinks
from zo_core.jobs import MechanismJob
from zo_core.models import resident
from zo_core.models.catalog import describe
from zo_core.models.load import load_tokenizer
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.recipes.scan import broken_layers
from zo_core.runs import Run, to_json
from zo_core.tasks.scoring import batches
from zo_core.tasks.texts import texts_of, tokenise


def run_mechanism(job: MechanismJob, run: Run, context: JobContext) -> None:
    """Look into the massive activations of a model on some texts; tables as they are found."""
    info = describe(job.model, job.revision)
    tokenizer = load_tokenizer(job, info)
    # Before any weight is read: a text or a setting that cannot be used.
    longest = min(job.max_tokens, info.context or tokenizer.model_max_length)
    sequences = tokenise(texts_of(job), tokenizer, job.bos, longest)
    loaded = resident.acquire(job, context.log)
    began = time.perf_counter()
    passes = len(list(batches(len(sequences), job.batch_size)))
    total = 2 * passes + 1 + len(INTERVENTIONS) * len(loaded.decoder)
    done = 0

    def tick(message: str) -> None:
        nonlocal done
        done += 1
        context.progress(done, total, message)
        context.check_cancelled()

    context.progress(0, total, "reading the texts")
    scan = ActivationScan(loaded, parts=False)
    scan.run(sequences, job.batch_size, lambda _done: context.check_cancelled())
    verdict = first_outlier_layer(job.rule, scan.layers())
    for sentence in broken_layers(scan, loaded.dtype_name):
        context.log(sentence)
    recording = Recording(loaded, sequences, job.batch_size, lambda: tick("reading the texts"))
    sites = find_sites(recording, job.channels)
    traced = trace(recording, sites)
    tick("following the residual stream")
    for name, table in (
        ("sites", traced.sites),
        ("contributions", traced.contributions),
        ("neurons", traced.neurons),
    ):
        _write(run, name, table)

    places = [massive_tokens(recording, site) for site in sites]
    anywhere = [torch.stack(marked).any(0) for marked in zip(*places, strict=True)]
    sinks = sink_shares(recording, anywhere, lambda: tick("attention weights"))
    _write(run, "sinks", sinks)
    no_sinks = without_sinks(recording, anywhere) if sinks.empty else ""
    if no_sinks:
        context.log(f"no attention sinks: {no_sinks}")
    base, table = intervene(recording, sites, lambda layer: tick(f"interventions, layer {layer}"))
    _write(run, "interventions", table)

    first = traced.sites.iloc[0]
    facts = {"run_id": run.run_id, "job": job.model_dump()}
    run.write_result("provenance.json", to_json(facts | provenance(loaded)))
    summary: dict[str, Any] = {
        "model": job.model,
        "revision": job.revision,
        "dtype": loaded.dtype_name,
        "n_layers": len(loaded.decoder),
        "rule": job.rule,
        "first_outlier_layer": verdict.layer,
        "reason": verdict.reason,
        "channels": traced.sites["channel"].tolist(),
        "writer": _part(first, "writer"),
        "remover": _part(first, "remover"),
        "neurons": _without_neurons(traced),
        "sinks": no_sinks,
        "massive_tokens": int(sum(int(m.sum()) for m in anywhere)),
        "sink_share": None if sinks.empty else float(sinks["share"].max()),
        "loss": base,
        "loss_change": _worst(table),
        "n_sequences": len(sequences),
        "n_tokens": sum(map(len, sequences)),
        "seconds": round(time.perf_counter() - began, 3),
    }
    run.write_result("summary.json", to_json(summary))


def _without_neurons(traced: Traced) -> str:
    """Why no neurons are named; empty if they are."""
    if not traced.neurons.empty:
        return ""
    if "mlp" in traced.sites[["writer", "remover"]].to_numpy():
        return "the down-projections of this family cannot be read"
    return "no MLP wrote or removed it"


def _part(site: pd.Series, role: str) -> dict[str, Any] | None:
    """Layer, part and contribution of a site's writer or remover; None if there is none."""
    if pd.isna(site[f"{role}_layer"]):
        return None
    done = site["written" if role == "writer" else "removed"]
    return {"layer": int(site[f"{role}_layer"]), "part": site[role], "value": float(done)}


def _worst(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By intervention, the layer where it raises the loss most."""
    found = {}
    for name, rows in table.groupby("intervention"):
        if rows["change"].notna().any():
            row = rows.loc[rows["change"].idxmax()]
            found[str(name)] = {"layer": int(row["layer"]), "change": float(row["change"])}
    return found


def _write(run: Run, name: str, table: pd.DataFrame) -> None:
    run.write_result(f"{name}.parquet", table.to_parquet(index=False))
    run.write_result(f"{name}.csv", table.to_csv(index=False))
