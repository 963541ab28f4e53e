"""Generation: the first line only, also where a line break hides in a longer token."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zo_core.models.load import LoadedModel
from zo_core.progress import Cancelled
from zo_core.tasks.generation import StopAtNewline, generate

NEW = 12


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which ``.`` + line break, and two line breaks, are single tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    line = "Ċ"  # how byte-level BPE writes a line break
    pieces = [*alphabet, f".{line}", f"{line}{line}", "</s>"]
    merges = [(".", line), (line, line)]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("text", ["Ann.\n", "Ann\n\n", "Ann\n"])
def test_stops_on_decoded_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("Who? Answer:\n")["input_ids"]
    answer = tokenizer(text)["input_ids"]
    assert len(answer) == 4, "the line break is no token of its own, but for the last text"
    stop = StopAtNewline(tokenizer, len(ids))
    for length in range(len(answer) + 1):
        row = torch.tensor([ids + answer[:length]])
        done = stop(row, torch.zeros(1))  # type: ignore[arg-type]
        assert done.tolist() == [length == len(answer)], "a line break of the prompt does not count"


@pytest.fixture
def script(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Replaces the model's logits: it says the tokens of its row, then letters for ever."""
    said: list[list[int]] = []
    real = demo.model.forward
    steps = {"done": 0}

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        logits = torch.full_like(output.logits, -30.0)
        for row, tokens in enumerate(said):
            at = steps["done"]
            logits[row, -1, tokens[at] if at < len(tokens) else 70] = 30.0
        steps["done"] += 1
        output.logits = logits
        return output

    monkeypatch.setattr(demo.model, "forward", forward)
    return said


def answers(demo: LoadedModel, prompts: Sequence[tuple[int, ...]], script: list[list[int]]) -> Any:
    return generate(replace(demo, tokenizer=byte_tokenizer()), prompts, NEW)


def test_each_row_ends_at_its_own_line_break(demo: LoadedModel, script: list[list[int]]) -> None:
    tokenizer = byte_tokenizer()
    texts = ["Ann.\nBen", " a lake\n\nand more", "one line that goes on and on", "\nnothing", ""]
    script += [tokenizer(t)["input_ids"] for t in texts]
    script[4] = [*tokenizer("end")["input_ids"], tokenizer.eos_token_id, *script[0]]
    prompts = [tuple(range(40, 40 + n)) for n in (3, 9, 5, 4, 7)]
    found = answers(demo, prompts, script)
    assert found == ["Ann.", "a lake", "one line tha", "", "end"]


def test_generation_stops_once_every_row_is_done(
    demo: LoadedModel, script: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    counted = demo.model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return counted(*args, **kwargs)

    monkeypatch.setattr(demo.model, "forward", count)
    tokenizer = byte_tokenizer()
    script += [tokenizer(t)["input_ids"] for t in ("No.\nx", "Yes\n\nx")]
    assert answers(demo, [(40, 41), (42, 43, 44)], script) == ["No.", "Yes"]
    assert len(calls) == 4


def test_a_cancel_is_seen_between_two_tokens(demo: LoadedModel) -> None:
    calls = []

    def tick() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(demo, [(40, 41)], NEW, tick)
    assert len(calls) == 3


def test_settings_of_the_model_do_not_change_greedy_generation(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tuple(demo.tokenizer(t)["input_ids"]) for t in ("The film was", "A quiet")]
    plain = generate(demo, prompts, NEW)
    config: Any = demo.model.generation_config
    for name, value in {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "repetition_penalty": 3.0,
        "num_beams": 3,
    }.items():
        monkeypatch.setattr(config, name, value)
    assert generate(demo, prompts, NEW) == plain


def test_batched_answers_are_those_of_single_prompts(demo: LoadedModel) -> None:
    texts = ("The film was", "A quiet harbour and a loud sea, and then the", "Why")
    prompts = [tuple(demo.tokenizer(t)["input_ids"]) for t in texts]
    assert generate(demo, prompts, NEW) == [generate(demo, [p], NEW)[0] for p in prompts]
