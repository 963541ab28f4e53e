"""Scan: activation statistics of every layer, and what each outlier rule says of them."""

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from zo_core.analysis.activations import EMBEDDING, ActivationScan
from zo_core.analysis.known import published_facts
from zo_core.analysis.outliers import ScanTables, Verdict, first_outlier_layer
from zo_core.analysis.outliers.agreement import consensus, judge_all
from zo_core.analysis.streaming import scan_blockwise
from zo_core.jobs import ScanJob
from zo_core.models import resident
from zo_core.models.blockwise import BlockwiseModel
from zo_core.models.catalog import describe
from zo_core.models.load import LoadedModel, load, load_tokenizer
from zo_core.progress import JobContext
from zo_core.provenance import provenance
from zo_core.runs import Run, to_json
from zo_core.tasks.texts import texts_of, tokenise


def run_scan(job: ScanJob, run: Run, context: JobContext) -> None:
    """Scan a model and write its tables."""
    info = describe(job.model, job.revision)
    tokenizer = load_tokenizer(job, info)
    # Before any weight is read: a text or a setting that cannot be used.
    sequences = _sequences(job, texts_of(job), tokenizer, info.context, context)
    with ExitStack() as stack:
        if job.placement == "stream":
            context.log(f"Opening {job.model} block by block")
            streamed = BlockwiseModel(job)
            loaded = streamed.loaded
            began = time.perf_counter()
            scan = _scan_blockwise(streamed, job, sequences, context)
        else:
            if job.placement == "offload":
                context.log(f"Loading {job.model}, part of it off the device")
                folder = stack.enter_context(TemporaryDirectory(prefix="zoscope-offload-"))
                loaded = load(job, Path(folder))
            else:
                loaded = resident.acquire(job, context.log)
            began = time.perf_counter()
            scan = _scan_whole(loaded, job, sequences, context)
        _write(job, run, context, loaded, scan, began)


def _write(
    job: ScanJob,
    run: Run,
    context: JobContext,
    loaded: LoadedModel,
    scan: ActivationScan,
    began: float,
) -> None:
    tables = ScanTables(scan.layers(), scan.parts(), scan.channels(), scan.weights(), scan.owl())
    verdicts = judge_all(tables)
    for name, table in {**tables.named(), "tokens": scan.tokens()}.items():
        run.write_result(f"{name}.parquet", table.to_parquet(index=False))
    summary = _summary(job, loaded, scan, tables.layers, verdicts, time.perf_counter() - began)
    facts = {"run_id": run.run_id, "job": job.model_dump()}
    run.write_result("provenance.json", to_json(facts | provenance(loaded)))
    run.write_result("summary.json", to_json(summary))
    for name, verdict in verdicts.items():
        context.log(f"{name}: {verdict.reason}")
    context.log(summary["consensus"])
    for sentence in broken_layers(scan, loaded.dtype_name):
        context.log(sentence)


def broken_layers(scan: ActivationScan, dtype: str) -> list[str]:
    """A sentence for every layer with NaN or infinite activations."""
    found = []
    for number, (layer, count, token) in enumerate(scan.nonfinite()):
        name = "the embedding output" if layer == EMBEDDING else f"layer {layer}"
        sentence = f"{name} has {count} NaN or infinite activations, first at {token!r}"
        if dtype == "float16" and not number:
            sentence += ": it is the first to pass what float16 can hold, scan in bfloat16"
        found.append(sentence)
    return found


def _sequences(
    job: ScanJob,
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    context: JobContext,
) -> list[list[int]]:
    limit = min(job.max_tokens, longest or tokenizer.model_max_length)
    sequences = tokenise(texts, tokenizer, job.bos, limit)
    if len(sequences) < len(texts):
        context.log(f"{len(texts) - len(sequences)} texts were too short and left out")
    return sequences


def _scan_whole(
    loaded: LoadedModel, job: ScanJob, sequences: list[list[int]], context: JobContext
) -> ActivationScan:
    def tick(done: int) -> None:
        context.progress(done, len(sequences), f"{done} of {len(sequences)} texts")
        context.check_cancelled()

    context.check_cancelled()
    scan = ActivationScan(loaded)
    scan.run(sequences, job.batch_size, tick)
    return scan


def _scan_blockwise(
    model: BlockwiseModel, job: ScanJob, sequences: list[list[int]], context: JobContext
) -> ActivationScan:
    """Of a model of which one block is in memory at a time."""

    def tick(layer: int, done: int) -> None:
        step = layer * len(sequences) + done
        context.progress(step, len(model) * len(sequences), f"layer {layer} of {len(model)}")
        context.check_cancelled()

    context.check_cancelled()
    scan = ActivationScan(model.loaded)
    scan_blockwise(scan, model, sequences, job.batch_size, tick)
    return scan


def find_first_outlier_layer(loaded: LoadedModel, rule: str, context: JobContext) -> Verdict:
    """What a rule says of a loaded model, on a short scan: eight passages of 128 tokens."""
    if loaded.model not in _short_scans:
        job = ScanJob(model=loaded.name, sequences=8, max_tokens=128)
        sequences = _sequences(job, texts_of(job), loaded.tokenizer, loaded.context, context)
        scan = ActivationScan(loaded, parts=False)
        scan.run(sequences, job.batch_size, lambda _done: context.check_cancelled())
        _short_scans[loaded.model] = scan.layers()
    return first_outlier_layer(rule, _short_scans[loaded.model])


_short_scans: WeakKeyDictionary[nn.Module, pd.DataFrame] = WeakKeyDictionary()
"""A resident model between jobs has its base weights, so its short scan stays true."""


def _summary(
    job: ScanJob,
    loaded: LoadedModel,
    scan: ActivationScan,
    layers: pd.DataFrame,
    verdicts: dict[str, Verdict],
    seconds: float,
) -> dict[str, Any]:
    blocks = layers[layers["layer"] != EMBEDDING]
    with_bos = scan.begins_with(loaded.tokenizer.bos_token_id)
    return {
        "model": job.model,
        "revision": job.revision,
        "dtype": loaded.dtype_name,
        "device": str(loaded.device),
        "n_layers": len(loaded.decoder),
        "hidden_size": loaded.info.hidden_size,
        "top1": blocks["top1"].tolist(),
        "median": blocks["median"].tolist(),
        "first_outlier_layer": {name: v.layer for name, v in verdicts.items()},
        "verdicts": {
            name: {"layer": v.layer, "state": v.state, "reason": v.reason, "numbers": v.numbers}
            for name, v in verdicts.items()
        },
        "consensus": consensus(verdicts),
        "published": published_facts(job.model, loaded.info, with_bos),
        "bos": {
            "setting": job.bos,
            "token": loaded.tokenizer.bos_token,
            "in_text": with_bos,
        },
        "nonfinite": blocks["nonfinite"].tolist(),
        "placement": job.placement,
        "text": job.text,
        "n_sequences": scan.n_sequences,
        "n_tokens": scan.n_tokens,
        "seconds": round(seconds, 3),
    }
