"""The README of an exported folder: what it is, and the run it comes from."""

from typing import Any

from zo_core.artifacts.source import Source
from zo_core.models.catalog import HUB_ID
from zo_core.tasks.catalog import METRIC_NAMES

_LOAD = {
    "model": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")'
    ),
    "adapter": (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'base = AutoModelForCausalLM.from_pretrained("BASE_MODEL")\n'
        'model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")'
    ),
}


def card(source: Source, manifest: dict[str, Any]) -> str:
    """The card of a ``model`` or ``adapter`` folder, in Markdown."""
    job, form = source.job, str(manifest["format"]).removeprefix("zoscope-")
    rows = {
        "base model": job.model + (f", revision {job.revision}" if job.revision else ""),
        "base weights": f"fingerprint {manifest['base']['fingerprint'] or 'not known'}",
        "dtype": manifest["dtype"],
        "task": job.task,
        "scope": source.scope,
        "tuned parameters": f"{manifest['tuned_parameters']:,}",
        "optimizer": f"{job.optimizer}, lr {job.effective_lr:g}, eps {job.eps:g}, "
        f"batch size {job.batch_size}, seed {job.seed}",
        "weights": source.says,
        "run": source.run.run_id,
    }
    rows |= _measured(source)
    notes = ["Tuned with ZOScope. All facts, with the SHA-256 of each file, are in `export.json`."]
    if manifest.get("merged"):
        notes.append(
            "The run tuned LoRA adapters. Here they are **merged** into the weights (added in "
            "float32, then rounded to the dtype), so logits equal the tuned model's up to rounding."
        )
    table = "\n".join(
        f"| {name} | {str(value).replace('|', '/')} |" for name, value in rows.items()
    )
    return (
        f"{_front_matter(source, form)}# {form.capitalize()} of {source.run.run_id}\n\n"
        + "\n\n".join(notes)
        + f"\n\n| | |\n|---|---|\n{table}\n\n```python\n{_LOAD[form]}\n```\n"
    )


def _front_matter(source: Source, form: str) -> str:
    lines = [f"library_name: {'peft' if form == 'adapter' else 'transformers'}"]
    if source.job.model != "demo" and HUB_ID.match(source.job.model):
        lines.append(f"base_model: {source.job.model}")
    lines.append("tags: [zoscope, zeroth-order]")
    return "---\n" + "\n".join(lines) + "\n---\n\n"


def _measured(source: Source) -> dict[str, str]:
    """What the run measured; after tuning only if that was with the exported weights."""
    summary = source.run.result_json() or {}
    before = summary.get("before") or source.details.get("before")
    kept = summary.get("kept", "last") == source.weights
    after = summary.get("after") if kept and source.state == "done" else None
    found = {}
    for name, outcome in (("before tuning", before), ("after tuning", after)):
        if outcome:
            shown = [f"{METRIC_NAMES[k]} {v:.4f}" for k, v in outcome.items() if k in METRIC_NAMES]
            shown.append(f"loss {outcome['loss']:.4f}")
            found[f"validation, {name}"] = f"{', '.join(shown)} ({outcome['examples']} rows)"
    return found
