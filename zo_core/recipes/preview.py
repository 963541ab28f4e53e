"""Preview: rows of a task as the model gets them, with the scored tokens marked; no weights."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from zo_core.jobs import PreviewJob
from zo_core.models.catalog import describe
from zo_core.models.load import load_tokenizer
from zo_core.progress import JobContext
from zo_core.runs import Run, to_json
from zo_core.tasks.data import load_job_task
from zo_core.tasks.templates import Candidate, Example, encode


def run_preview(job: PreviewJob, run: Run, context: JobContext) -> None:
    """Render and tokenise the first training rows of a task."""
    data = load_job_task(job, seed=job.seed, dev_examples=job.dev_examples)
    info = describe(job.model, job.revision)
    tokenizer = load_tokenizer(job, info)
    longest = info.context or tokenizer.model_max_length
    shown = data.train[: job.rows]
    examples = [encode(data.task, row, tokenizer, longest) for row in shown]
    context.progress(len(shown), len(shown), f"{len(shown)} rows rendered")
    run.write_result(
        "summary.json",
        to_json(
            {
                "model": job.model,
                "task": job.task,
                "metric": data.task.metric,
                "loss": data.task.loss,
                "data": data.source,
                "rows": {
                    "train": len(data.train),
                    "dev": len(data.dev),
                    "validation": len(data.validation),
                },
                "context": longest,
                "examples": [_describe(e, tokenizer) for e in examples],
            }
        ),
    )


def _describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "label": example.label,
        "truncated": example.truncated,
        "candidates": [_pieces(c, tokenizer) for c in example.candidates],
        "references": list(example.references),
    }


def _pieces(candidate: Candidate, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The prompt as one text, and the text of each scored token."""
    return {
        "prompt": tokenizer.decode(list(candidate.tokens[: candidate.start])),
        "scored": [tokenizer.decode([token]) for token in candidate.scored],
        "tokens": len(candidate.tokens),
    }
