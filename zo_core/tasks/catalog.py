"""The tasks that ZOScope knows: fields, hub addresses, prompts, losses and metrics. No torch here.

Prompts are MeZO's (docs/tasks.md has the table). A :class:`TaskInfo` says everything about a task
that is not a row of it; :meth:`TaskInfo.render` turns a row into text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zo_core.errors import UserError
from zo_core.tasks import prompts
from zo_core.tasks.prompts import Rendered, Row

SAMPLES = Path(__file__).resolve().parent / "samples"
OWN = "own"
"""The task whose rows, template and candidates the job brings along."""

OWN_SUFFIXES = (".csv", ".jsonl", ".jsonl.gz", ".parquet")
"""Kinds of files that a user's own rows come in."""

Metric = Literal["accuracy", "f1"]
METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "em": "exact match", "f1a": "F1a"}
"""How the metrics of an evaluation are called."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task: a prompt, then one of several candidates or an answer to generate."""

    name: str
    title: str
    description: str
    prompt: str
    """Format string over the texts of a row; the answer follows it."""
    fields: tuple[str, ...]
    """Fields that every row must have."""
    candidates: tuple[str, ...] = ()
    """The word of each label, in label order; empty where a row brings its own options."""
    answer: str = " {}"
    """Format string of what follows the prompt: the separator and the answer."""
    metric: Metric = "accuracy"
    """The one metric that stands for the task where there is room for one."""
    loss: Literal["candidates", "gold"] = "candidates"
    """Cross entropy over the candidates' scores, or on the right option's tokens only."""
    generates: bool = False
    """Evaluated by greedy generation, and so by F1 and exact match, not by ranking options."""
    positive_f1: bool = False
    """F1 of label 1 over all rows is reported, too (MultiRC's F1a)."""
    label_field: str = "label"
    """Ignored where the task generates."""
    labels: tuple[str, ...] = ()
    """The value of each label as text, in label order; empty: 0, 1, ..."""
    texts: Callable[[Row], dict[str, str]] | None = None
    """The texts that the prompt is made of; None: the row's fields as they are."""
    options: Callable[[Row], Sequence[str]] | None = None
    """The row's own options (or right answers, where the task generates)."""
    dev: int = 500
    """Training rows that are held out, if the job does not say how many."""
    bundled: bool = False
    hub: tuple[str, str | None] | None = None
    """(hub id, configuration) for ``datasets``."""
    hub_revision: str | None = None

    def render(self, row: Row) -> Rendered:
        """A row as text.

        Raises:
            ValueError: the row cannot be rendered; the text goes on from "row 3 of sst2/train".
        """
        texts = self.texts(row) if self.texts else {name: str(row[name]) for name in self.fields}
        options = tuple(self.options(row)) if self.options else self.candidates
        references = options if self.generates else ()
        options = options[:1] if self.generates else options
        return Rendered(
            prompt=self.prompt.format_map(texts).lstrip(),
            options=options,
            continuations=tuple(self.answer.format(option) for option in options),
            label=0 if self.generates else self.label_of(row, len(options)),
            references=references,
        )

    def label_of(self, row: Row, count: int) -> int:
        """Index of a row's right option among ``count``.

        Raises:
            ValueError: its label is none of the task's.
        """
        value = row[self.label_field]
        if self.labels:
            if label_text(value) in self.labels:
                return self.labels.index(label_text(value))
            raise ValueError(f"has label {value!r}, which no verbalizer names")
        if value not in range(count):
            words = f" ({', '.join(self.candidates)})" if self.candidates else ""
            raise ValueError(f"has label {value!r}; {self.name} knows 0 to {count - 1}{words}")
        return int(value)


def label_text(value: Any) -> str:
    """A label as it is written in ``verbalizers``: 1 and 1.0 as ``1``, true as ``true``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


GLUE, GLUE_REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
SUPER_GLUE, SUPER_GLUE_REVISION = "aps/super_glue", "3de24cf8022e94f4ee4b9d55a6f539891524d646"
SMALL_DEV = 100
"""Held out of the training rows of CB, COPA, WSC and the bundled reviews, which have few."""


def _super_glue(configuration: str, **fields: Any) -> TaskInfo:
    return TaskInfo(hub=(SUPER_GLUE, configuration), hub_revision=SUPER_GLUE_REVISION, **fields)


TASKS: dict[str, TaskInfo] = {
    task.name: task
    for task in (
        TaskInfo(
            name="reviews",
            title="Film reviews (bundled)",
            description="One-line film reviews written for ZOScope: positive or negative.",
            prompt="{sentence} It was",
            fields=("sentence",),
            candidates=("terrible", "great"),
            texts=prompts.sentence_texts,
            dev=SMALL_DEV,
            bundled=True,
        ),
        TaskInfo(
            name="sst2",
            title="SST-2",
            description="Stanford Sentiment Treebank: positive or negative film-review sentences.",
            prompt="{sentence} It was",
            fields=("sentence",),
            candidates=("terrible", "great"),
            texts=prompts.sentence_texts,
            hub=(GLUE, "sst2"),
            hub_revision=GLUE_REVISION,
        ),
        _super_glue(
            "rte",
            name="rte",
            title="RTE",
            description="Does the premise entail the hypothesis?",
            prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            fields=("premise", "hypothesis"),
            candidates=("Yes", "No"),
            answer="{}",
        ),
        _super_glue(
            "cb",
            name="cb",
            title="CB",
            description="CommitmentBank: entailment, contradiction or neither.",
            prompt='Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            fields=("premise", "hypothesis"),
            candidates=("Yes", "No", "Maybe"),
            answer="{}",
            dev=SMALL_DEV,
        ),
        _super_glue(
            "boolq",
            name="boolq",
            title="BoolQ",
            description="Yes-or-no questions about a passage.",
            prompt="{passage} {question}\n",
            fields=("passage", "question"),
            candidates=("No", "Yes"),
            answer="{}",
            texts=prompts.boolq_texts,
        ),
        _super_glue(
            "wsc.fixed",
            name="wsc",
            title="WSC",
            description="Winograd schemas: does the pronoun refer to that noun?",
            prompt='{text}\nIn the previous sentence, does the pronoun "{span2}" refer to {span1}? '
            "Yes or No?\n",
            fields=("text", "span1_text", "span2_text"),
            candidates=("No", "Yes"),
            answer="{}",
            texts=prompts.wsc_texts,
            dev=SMALL_DEV,
        ),
        _super_glue(
            "copa",
            name="copa",
            title="COPA",
            description="Which of two choices is the cause or the effect of the premise?",
            prompt="{premise} {conjunction}",
            fields=("premise", "choice1", "choice2", "question"),
            loss="gold",
            texts=prompts.copa_texts,
            options=prompts.copa_choices,
            dev=SMALL_DEV,
        ),
        _super_glue(
            "multirc",
            name="multirc",
            title="MultiRC",
            description="Is this answer to a question about a paragraph right?",
            prompt='{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that '
            "correct? Yes or No?\n",
            fields=("paragraph", "question", "answer"),
            candidates=("No", "Yes"),
            answer="{}",
            positive_f1=True,
        ),
        TaskInfo(
            name="squad",
            title="SQuAD",
            description="Answer a question with words of its context; generated.",
            prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            fields=("title", "context", "question", "answers"),
            answer=" {}\n",
            metric="f1",
            loss="gold",
            generates=True,
            texts=prompts.squad_texts,
            options=prompts.squad_answers,
            hub=("rajpurkar/squad", None),
            hub_revision="7b6d24c440a36b6815f21b70d25016731768db1f",
        ),
        TaskInfo(
            name="drop",
            title="DROP",
            description="Answer a question that needs counting or arithmetic; generated.",
            prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
            fields=("passage", "question", "answers_spans"),
            answer=" {}\n",
            metric="f1",
            loss="gold",
            generates=True,
            texts=prompts.drop_texts,
            options=prompts.drop_answers,
            hub=("ucinlp/drop", None),
            hub_revision="95cda593fae71b60b5b19f82de3fcf3298c1239c",
        ),
    )
}


def find_task(name: str) -> TaskInfo:
    """The task of that name.

    Raises:
        UserError: it is unknown; the sentence lists the choices.
    """
    if name not in TASKS:
        raise UserError(f"task: {name!r} is unknown: choose one of {', '.join(TASKS)} or {OWN}.")
    return TASKS[name]


def main_metric(name: str) -> str:
    """The main metric of a task by its name; accuracy for the user's own and for unknown ones."""
    return TASKS[name].metric if name in TASKS else "accuracy"
