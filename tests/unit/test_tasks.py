"""From rows to scores: prompts, scored spans and layout, with every kind of tokenizer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.unit.tokenizer_kinds import KINDS, first_id
from zo_core.errors import UserError
from zo_core.models.load import LoadedModel
from zo_core.tasks.catalog import TASKS
from zo_core.tasks.data import load_task
from zo_core.tasks.scoring import candidate_scores, task_loss
from zo_core.tasks.templates import Example, encode
from zo_core.zo.forward import FastForward
from zo_core.zo.reference import ReferenceForward

REVIEWS = TASKS["reviews"]
CONTEXT = 512


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]()


def test_prompt_and_scored_span(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in load_task("reviews", train_examples=25).train:
        example = encode(REVIEWS, row, tokenizer, CONTEXT)
        prompt = tokenizer(f"{row['sentence']} It was", add_special_tokens=False)["input_ids"]
        opening = [] if first_id(tokenizer) is None else [first_id(tokenizer)]
        assert example.label == row["label"]
        assert not example.truncated
        for word, candidate in zip(REVIEWS.candidates, example.candidates, strict=True):
            assert tokenizer.decode(candidate.scored).strip() == word
            assert candidate.tokens[: candidate.start] == (*opening, *prompt)
            full = tokenizer(f"{row['sentence']} It was {word}", add_special_tokens=False)
            assert candidate.tokens == (*opening, *full["input_ids"])


def test_long_prompts_are_cut_on_the_left_after_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"sentence": "A quiet harbour and a loud sea. " * 12, "label": 1}
    whole = encode(REVIEWS, row, tokenizer, 10**6)
    longest = max(len(c.tokens) for c in whole.candidates)
    assert not encode(REVIEWS, row, tokenizer, longest).truncated
    for context in (longest - 1, longest // 2, 16):
        cut = encode(REVIEWS, row, tokenizer, context)
        assert cut.truncated
        assert max(len(c.tokens) for c in cut.candidates) == context
        for short, full in zip(cut.candidates, whole.candidates, strict=True):
            assert short.scored == full.scored
            opening = 0 if first_id(tokenizer) is None else 1
            assert short.tokens[:opening] == full.tokens[:opening]
            kept = len(short.tokens) - opening
            assert short.tokens[opening:] == full.tokens[-kept:]
        prompts = {c.tokens[: c.start] for c in cut.candidates}
        assert len(prompts) == 1, "all candidates see the same prompt"


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=60))
def test_any_text_is_kept_by_a_lossless_tokenizer(sentence: str) -> None:
    demo = KINDS["byte-level BPE"]()
    example = encode(REVIEWS, {"sentence": sentence, "label": 0}, demo, CONTEXT)
    for word, candidate in zip(REVIEWS.candidates, example.candidates, strict=True):
        text = demo.decode(candidate.tokens, clean_up_tokenization_spaces=False)
        assert text == f"{sentence.strip()} It was {word}".lstrip()
        assert demo.decode(candidate.scored) == f" {word}"


def test_braces_in_a_row_are_text() -> None:
    demo = KINDS["byte-level BPE"]()
    example = encode(REVIEWS, {"sentence": "{label} {0} {", "label": 0}, demo, CONTEXT)
    assert demo.decode(example.candidates[0].tokens).startswith("{label} {0} { It was")


def test_merge_across_the_border_is_scored_as_answer() -> None:
    """A tokenizer without words: the prompt's last letter and the answer's first are one token."""
    letters = sorted({c for c in "A dull film. It was great terrible"})
    pieces = [*letters, "s ", "s g"]
    tokens = {piece: i for i, piece in enumerate(pieces)}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(tokens, [("s", " "), ("s ", "g")]))
    )
    example = encode(REVIEWS, {"sentence": "A dull film.", "label": 0}, merging, CONTEXT)
    scored = [merging.convert_ids_to_tokens(list(c.scored)) for c in example.candidates]
    assert scored == [["s ", *"terrible"], ["s g", *"reat"]]
    assert len({c.start for c in example.candidates}) == 1


def test_candidate_without_a_token_is_a_sentence() -> None:
    silent = Tokenizer(models.WordLevel({"it": 0, "was": 1, "[UNK]": 2}, unk_token="[UNK]"))
    silent.normalizer = normalizers.Replace(" great", "")
    silent.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=silent, unk_token="[UNK]")
    with pytest.raises(UserError, match="candidate 'great' of reviews adds no token"):
        encode(REVIEWS, {"sentence": "fine.", "label": 0}, tokenizer, CONTEXT)


CANDIDATES = ("terrible", "great", "great fun for everyone", "so-so")
"""Of one and of several tokens; one begins another."""


@torch.no_grad()
def plain_scores(loaded: LoadedModel, example: Example) -> list[float]:
    """Each candidate alone, unpadded: the mean log-probability of its tokens."""
    scores = []
    for candidate in example.candidates:
        ids = torch.tensor([candidate.tokens], device=loaded.device)
        log_probability = loaded.model(input_ids=ids).logits[0].float().log_softmax(-1)
        places = range(candidate.start, len(candidate.tokens))
        values = [float(log_probability[at - 1, candidate.tokens[at]]) for at in places]
        scores.append(sum(values) / len(values))
    return scores


@pytest.mark.parametrize("path", ["reference", "fast", "fast from layer 4"])
def test_scores_equal_a_plain_computation(demo: LoadedModel, path: str) -> None:
    task = replace(REVIEWS, candidates=CANDIDATES)
    rows = load_task("reviews").train[:7]
    examples = [encode(task, r | {"label": i % 4}, demo.tokenizer, 512) for i, r in enumerate(rows)]
    sizes = [len(c.scored) for c in examples[0].candidates]
    assert sizes[0] == 1
    assert sizes[2] > 2, "several tokens are scored"
    forward = {
        "reference": lambda: ReferenceForward(demo),
        "fast": lambda: FastForward(demo),
        "fast from layer 4": lambda: FastForward(demo, 4),
    }[path]()
    wanted = torch.tensor([plain_scores(demo, e) for e in examples])
    labels = torch.tensor([e.label for e in examples])
    for batch in (range(7), range(2, 5), range(6, 7)):
        prepared = forward.prepare([examples[i] for i in batch])
        logits = forward.logits(prepared)
        part = slice(batch.start, batch.stop)
        scores = candidate_scores(logits, prepared.scored).cpu()
        torch.testing.assert_close(scores, wanted[part], rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(wanted[part], labels[part])
        assert float(task_loss(logits, prepared.scored)) == pytest.approx(float(loss), rel=1e-4)
