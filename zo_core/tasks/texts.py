"""Texts to scan: the bundled passages, the user's own prompt, or rows of a task."""

import json

from transformers import PreTrainedTokenizerBase

from zo_core.errors import UserError
from zo_core.jobs import TextFields
from zo_core.tasks.catalog import SAMPLES
from zo_core.tasks.data import load_job_task

SHORTEST = 4
"""Tokens below which a text says nothing of a layer."""


def texts_of(job: TextFields) -> list[str]:
    """The texts that a job asks for, at most ``job.sequences``.

    Raises:
        UserError: the task's data cannot be found.
    """
    if job.text == "prompt":
        return [job.prompt or ""]
    if job.text == "task":
        data = load_job_task(job, dev_examples=0)
        return [data.task.render(row).prompt for row in data.train[: job.sequences]]
    lines = (SAMPLES / "passages.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines][: job.sequences]


def tokenise(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, bos: str, max_tokens: int
) -> list[list[int]]:
    """Token ids of each text, BOS as asked for, at most ``max_tokens`` long.

    Raises:
        UserError: BOS is asked for and the tokenizer has none, or every text is too short.
    """
    if bos == "add" and tokenizer.bos_token_id is None:
        raise UserError("bos: this tokenizer has no BOS token: choose auto or none.")
    sequences = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=bos == "auto")["input_ids"]
        if bos == "add":
            ids = [tokenizer.bos_token_id, *ids]
        sequences.append(ids[:max_tokens])
    kept = [ids for ids in sequences if len(ids) >= SHORTEST]
    if not kept:
        raise UserError(
            f"text: the longest text has {max(map(len, sequences), default=0)} tokens: give at "
            f"least {SHORTEST}."
        )
    return kept
