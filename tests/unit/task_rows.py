"""A few rows for each of the nine tasks, written for these tests, and their prompts by hand."""

import json
import os
from pathlib import Path
from typing import Any

from zo_core.settings import ROOT

BENCHMARKS = Path(os.environ.get("ZO_DATA_DIR") or ROOT.parent / "shared" / "data" / "benchmarks")
Row = dict[str, Any]

LAKE = "The lake froze early. A boy skated to the island. His sister, Ann, waited on the shore"

ROWS: dict[str, list[Row]] = {
    "sst2": [
        {"sentence": "a warm and funny walk through one long summer ", "label": 1},
        {"sentence": "dull , loud and far too long ", "label": 0},
    ],
    "rte": [
        {"premise": "Mia sold her boat in May.", "hypothesis": "Mia had a boat.", "label": 0},
        {"premise": "The shop opens at nine.", "hypothesis": "The shop is closed.", "label": 1},
    ],
    "cb": [
        {"premise": "I know that it rained.", "hypothesis": "it rained", "label": 0},
        {"premise": "I doubt that it rained.", "hypothesis": "it rained", "label": 1},
        {"premise": "Did it rain?", "hypothesis": "it rained", "label": 2},
    ],
    "boolq": [
        {"passage": f"{LAKE}.", "question": "did the lake freeze", "label": 1},
        {"passage": f"{LAKE}.", "question": "Did Ann skate?", "label": 0},
    ],
    "wsc": [
        {
            "text": "Tom thanked Ben because He had helped.",
            "span1_text": "Ben",
            "span2_text": "He",
            "label": 1,
        },
        {
            "text": "Tom thanked Ben because He had helped.",
            "span1_text": "Tom",
            "span2_text": "He",
            "label": 0,
        },
    ],
    "copa": [
        {
            "premise": "The cup fell.",
            "choice1": "It broke.",
            "choice2": "I sang a song.",
            "question": "effect",
            "label": 0,
        },
        {
            "premise": "I ran home! ",
            "choice1": "The sun shone.",
            "choice2": "A storm came.",
            "question": "cause",
            "label": 1,
        },
    ],
    "multirc": [
        {"paragraph": LAKE, "question": "Who skated?", "answer": "A boy", "label": 1},
        {"paragraph": f" {LAKE}", "question": "Who skated?", "answer": "Ann", "label": 0},
    ],
    "squad": [
        {
            "title": "Lakes",
            "context": LAKE,
            "question": "Who waited? ",
            "answers": {"text": ["Ann", "His sister"], "answer_start": [65, 52]},
        },
        {
            "title": "",
            "context": LAKE,
            "question": "What froze?",
            "answers": {"text": ["The lake"], "answer_start": [0]},
        },
    ],
    "drop": [
        {
            "passage": "It was 3 to 1 at the break and 5 to 4 at the end.",
            "question": " How many goals were there in all?",
            "answers_spans": {"spans": ["9", "nine"], "types": ["number", "span"]},
        },
        {
            "passage": "Ann ran ten miles, Ben ran two.",
            "question": "Who ran further?",
            "answers_spans": {"spans": ["Ann"], "types": ["span"]},
        },
    ],
}
"""The first row of each task is also in :data:`EXPECTED`."""

EXPECTED: dict[str, tuple[str, list[str]]] = {
    "sst2": ("a warm and funny walk through one long summer It was", [" terrible", " great"]),
    "rte": (
        'Mia sold her boat in May.\nDoes this mean that "Mia had a boat." is true? Yes or No?\n',
        ["Yes", "No"],
    ),
    "cb": (
        'Suppose I know that it rained. Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
    ),
    "boolq": (f"{LAKE}. Did the lake freeze?\n", ["No", "Yes"]),
    "wsc": (
        "Tom thanked Ben because He had helped.\nIn the previous sentence, does the pronoun "
        '"he" refer to Ben? Yes or No?\n',
        ["No", "Yes"],
    ),
    "copa": ("The cup fell so", [" it broke.", " I sang a song."]),
    "multirc": (
        f'{LAKE}\nQuestion: Who skated?\nI found this answer "A boy". Is that correct? '
        "Yes or No?\n",
        ["No", "Yes"],
    ),
    "squad": (f"Title: Lakes\nContext: {LAKE}\nQuestion: Who waited?\nAnswer:", [" Ann\n"]),
    "drop": (
        "Passage: It was 3 to 1 at the break and 5 to 4 at the end.\nQuestion: How many goals were "
        "there in all?\nAnswer:",
        [" 9\n"],
    ),
}
"""Prompt and continuations of the first row of each task, written out by hand."""


def by_the_table(task: str, row: Row) -> tuple[str, list[str]]:
    """Prompt and continuations of any row, said again from the published table of prompts."""
    if task == "sst2":
        return f"{row['sentence'].strip()} It was", [" terrible", " great"]
    if task == "rte":
        prompt = (
            f'{row["premise"]}\nDoes this mean that "{row["hypothesis"]}" is true? Yes or No?\n'
        )
        return prompt, ["Yes", "No"]
    if task == "cb":
        prompt = f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? '
        return f"{prompt}Yes, No, or Maybe?\n", ["Yes", "No", "Maybe"]
    if task == "boolq":
        asked = row["question"][0].upper() + row["question"][1:]
        return f"{row['passage'].lstrip()} {asked}{'' if asked.endswith('?') else '?'}\n", [
            "No",
            "Yes",
        ]
    if task == "wsc":
        asked = f'the pronoun "{row["span2_text"].lower()}" refer to {row["span1_text"]}?'
        prompt = f"{row['text']}\nIn the previous sentence, does {asked} Yes or No?\n"
        return prompt, ["No", "Yes"]
    if task == "multirc":
        prompt = f"{row['paragraph'].lstrip()}\nQuestion: {row['question']}\n"
        prompt += f'I found this answer "{row["answer"]}". Is that correct? Yes or No?\n'
        return prompt, ["No", "Yes"]
    if task == "copa":
        premise = row["premise"].rstrip()
        premise = premise[:-1] if premise.endswith(".") else premise
        joined = {"effect": "so", "cause": "because"}[row["question"]]
        choices = [row["choice1"].split(" "), row["choice2"].split(" ")]
        for words in choices:
            words[0] = words[0] if words[0] == "I" else words[0].lower()
        return f"{premise} {joined}", [f" {' '.join(words)}" for words in choices]
    question = f"Question: {row['question'].strip()}\nAnswer:"
    if task == "squad":
        prompt = f"Title: {row['title']}\nContext: {row['context']}\n{question}"
        return prompt, [f" {row['answers']['text'][0]}\n"]
    return f"Passage: {row['passage']}\n{question}", [f" {row['answers_spans']['spans'][0]}\n"]


def write_tasks(folder: Path, train: int, validation: int) -> Path:
    """A data folder with so many rows of every task, the few above over and over."""
    for task, rows in ROWS.items():
        (folder / task).mkdir(parents=True)
        for split, count in (("train", train), ("validation", validation)):
            lines = (json.dumps(rows[i % len(rows)] | {"idx": i}) for i in range(count))
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines))
    return folder
