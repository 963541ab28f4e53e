"""Greedy generation of one-line answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from zo_core.models.load import LoadedModel


class StopAtNewline(StoppingCriteria):
    r"""Stops a row once its new text has a line break.

    It looks at decoded text, not at token ids: to byte-level BPE ``.\n`` or ``\n\n`` may be one
    token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        start: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Watch what comes after the first ``start`` tokens of a row; ``tick`` at every token."""
        self._tokenizer, self._start, self._tick = tokenizer, start, tick

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any
    ) -> torch.BoolTensor:
        """Which rows are done: bool [B]; ``input_ids`` is int64 [B, T]."""
        self._tick()
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :])
        done = torch.tensor(["\n" in text for text in texts], device=input_ids.device)
        return done  # type: ignore[return-value]


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """The first line that the model, with its weights as they are now, writes after each prompt.

    Args:
        loaded: the model.
        prompts: token ids; run as one left-padded batch.
        new_tokens: longest answer.
        tick: called at every token, and may raise to stop.

    Returns:
        One text a prompt, without spaces around it.
    """
    model: Any = loaded.model
    ends = _end_tokens(loaded)
    width = max(map(len, prompts))
    # Padding is never attended to; after an end token anything is cut off below.
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=loaded.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=loaded.device
    )
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        # Whatever a model's own generation_config says: what is None here would be taken from it.
        generation_config=GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=ends or None,
        ),
        stopping_criteria=StoppingCriteriaList([StopAtNewline(loaded.tokenizer, width, tick)]),
    )
    return [_first_line(loaded.tokenizer, row, ends) for row in out[:, width:].tolist()]


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """EOS of the tokenizer and of the model's own generation settings, which may have several."""
    model: Any = loaded.model
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return sorted({t for t in (loaded.tokenizer.eos_token_id, *listed) if t is not None})


def _first_line(tokenizer: PreTrainedTokenizerBase, row: list[int], ends: list[int]) -> str:
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    text: Any = tokenizer.decode(row[:end], skip_special_tokens=True)
    return text.partition("\n")[0].strip()
