"""Published first massive-activation layers of known models, as facts with their sources.

A model is known by its hub id, or by a configuration with the same shape. A fine-tuned model has
the shape of its base, and so has a model with random weights: the match says which it was.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from zo_core.models.catalog import ModelInfo

Bos = Literal["with", "without", "any"]
"""Whether the sequences began with a BOS token; ``any``: published without telling, or the same."""

OWEN = "Owen et al. 2025, A Refined Analysis of Massive Activations in LLMs (arXiv 2503.22329)"
AN = "An et al. 2025, Systematic Outliers in Large Language Models (arXiv 2502.06415)"
YU = "Yu et al. 2024, The Super Weight in Large Language Models (arXiv 2411.07191)"
MU = "Muyu He 2025, public notes on attention sinks in Qwen3 (@HeMuyu0327)"


@dataclass(frozen=True, slots=True)
class Published:
    """One published answer for a model."""

    layer: int | None
    """First layer, 0-based; None: published as having none."""
    rule: str
    """The rule of ours that asks what the source asked."""
    source: str
    bos: Bos = "any"
    channels: tuple[int, ...] = ()
    magnitude: str = ""
    note: str = ""

    @property
    def sentence(self) -> str:
        """``published: layer 1 (...)``."""
        layer = "none" if self.layer is None else f"layer {self.layer}"
        bos = {"with": ", with BOS", "without": ", without BOS", "any": ""}[self.bos]
        return f"published: {layer}{bos} ({self.source})"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with published answers."""

    name: str
    hub_ids: tuple[str, ...]
    shape: dict[str, int | str]
    """Fields of :class:`~zo_core.models.catalog.ModelInfo` that tell it."""
    published: tuple[Published, ...]

    def has_shape_of(self, info: ModelInfo) -> bool:
        """Whether a model's configuration has this model's shape."""
        return all(getattr(info, name) == value for name, value in self.shape.items())


@dataclass(frozen=True, slots=True)
class Match:
    """A known model and how it was recognised."""

    known: KnownModel
    by: Literal["hub id", "configuration"]


def recognise(model: str, info: ModelInfo | None = None) -> Match | None:
    """The known model that a hub id names, or whose shape a configuration has.

    Args:
        model: hub id or folder, as in a job spec.
        info: the model's configuration, where it has been read.
    """
    for known in KNOWN:
        if model.lower() in {hub_id.lower() for hub_id in known.hub_ids}:
            return Match(known, "hub id")
    if info is not None and info.source != "bundled":
        for known in KNOWN:
            if known.has_shape_of(info):
                return Match(known, "configuration")
    return None


def answers(known: KnownModel, with_bos: bool) -> list[Published]:
    """What was published for sequences that begin with BOS, or do not."""
    here: Bos = "with" if with_bos else "without"
    return [answer for answer in known.published if answer.bos in ("any", here)]


def published_facts(model: str, info: ModelInfo, with_bos: bool) -> dict[str, Any] | None:
    """What was published of a model, for the summary of a scan; None if it is not known.

    Returns:
        ``name, by`` (how it was recognised) and ``answers``: ``layer, rule, bos, channels,
        magnitude, note, source, sentence`` of each answer for sequences with, or without, BOS.
    """
    match = recognise(model, info)
    if match is None:
        return None
    found = [asdict(a) | {"sentence": a.sentence} for a in answers(match.known, with_bos)]
    return {"name": match.known.name, "by": match.by, "answers": found}


def _shape(
    model_type: str, n_layers: int, hidden_size: int, **more: int | str
) -> dict[str, int | str]:
    return {"model_type": model_type, "n_layers": n_layers, "hidden_size": hidden_size, **more}


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        "LLaMA2-7B",
        ("meta-llama/Llama-2-7b-hf",),
        _shape("llama", 32, 4096, intermediate_size=11008, vocab_size=32000, context=4096),
        (
            Published(
                1,
                "massive",
                OWEN,
                channels=(2533, 1415),
                magnitude="about 2400 to 2500",
                note="lasts to layer 29",
            ),
        ),
    ),
    KnownModel(
        "LLaMA2-13B",
        ("meta-llama/Llama-2-13b-hf",),
        _shape("llama", 40, 5120, intermediate_size=13824, vocab_size=32000, context=4096),
        (Published(3, "systematic", AN, channels=(4743, 2100), magnitude="about 1220"),),
    ),
    KnownModel(
        "LLaMA3-8B",
        ("meta-llama/Meta-Llama-3-8B",),
        _shape("llama", 32, 4096, intermediate_size=14336, vocab_size=128256, context=8192),
        (Published(1, "systematic", AN, channels=(788, 1384, 4062), magnitude="about 300"),),
    ),
    KnownModel(
        "Llama-3.2-1B",
        ("meta-llama/Llama-3.2-1B",),
        _shape("llama", 16, 2048, vocab_size=128256),
        (Published(1, "massive", OWEN, magnitude="217 to 384"),),
    ),
    KnownModel(
        "Llama-3.2-3B",
        ("meta-llama/Llama-3.2-3B",),
        _shape("llama", 28, 3072, vocab_size=128256),
        (Published(1, "massive", OWEN, magnitude="328 to 496"),),
    ),
    KnownModel(
        "Mistral-7B",
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.3"),
        _shape("mistral", 32, 4096, intermediate_size=14336),
        (Published(1, "massive", OWEN, channels=(2070, 3398), magnitude="about 270 to 320"),),
    ),
    KnownModel(
        "Mixtral-8x7B",
        ("mistralai/Mixtral-8x7B-v0.1",),
        _shape("mixtral", 32, 4096, intermediate_size=14336),
        (Published(1, "systematic", AN, channels=(2070, 3398)),),
    ),
    KnownModel(
        "Falcon-7B",
        ("tiiuae/falcon-7b",),
        _shape("falcon", 32, 4544),
        (Published(3, "massive", OWEN, magnitude="about 1100 to 1200"),),
    ),
    KnownModel(
        "Falcon-11B",
        ("tiiuae/falcon-11B",),
        _shape("falcon", 60, 4096),
        (Published(2, "massive", OWEN, magnitude="about 400"),),
    ),
    KnownModel(
        "Phi-2",
        ("microsoft/phi-2",),
        _shape("phi", 32, 2560),
        (
            Published(1, "massive", OWEN, "without", magnitude="264"),
            Published(2, "massive", OWEN, "with", magnitude="728"),
        ),
    ),
    KnownModel(
        "Phi-4",
        ("microsoft/phi-4",),
        _shape("phi3", 40, 5120),
        (Published(1, "massive", OWEN, magnitude="about 350"),),
    ),
    KnownModel(
        "Phi-3-mini",
        ("microsoft/Phi-3-mini-4k-instruct",),
        _shape("phi3", 32, 3072),
        (Published(2, "down_weights", YU, channels=(525, 1693, 1113)),),
    ),
    KnownModel(
        "OPT-6.7B",
        ("facebook/opt-6.7b",),
        _shape("opt", 32, 4096),
        (Published(0, "massive", OWEN, channels=(2394,), magnitude="about 150"),),
    ),
    KnownModel(
        "GPT-2 (small)",
        ("gpt2", "openai-community/gpt2"),
        _shape("gpt2", 12, 768),
        (Published(2, "massive", OWEN, channels=(447,), magnitude="about 2480"),),
    ),
    KnownModel(
        "OLMo-7B-0724",
        ("allenai/OLMo-7B-0724-hf",),
        _shape("olmo", 32, 4096, context=4096),
        (Published(1, "massive", OWEN, channels=(269,), magnitude="300 to 384"),),
    ),
    KnownModel(
        "OLMo-2-7B",
        ("allenai/OLMo-2-1124-7B",),
        _shape("olmo2", 32, 4096),
        (Published(None, "massive", OWEN),),
    ),
    KnownModel(
        "Gemma-7B",
        ("google/gemma-7b",),
        _shape("gemma", 28, 3072),
        (
            Published(None, "massive", OWEN, "without"),
            Published(0, "massive", OWEN, "with", magnitude="about 400"),
        ),
    ),
    KnownModel(
        "Gemma-2-2B",
        ("google/gemma-2-2b",),
        _shape("gemma2", 26, 2304),
        (
            Published(None, "massive", OWEN, "without"),
            Published(4, "massive", OWEN, "with", magnitude="728"),
        ),
    ),
    KnownModel(
        "Gemma-2-9B",
        ("google/gemma-2-9b",),
        _shape("gemma2", 42, 3584),
        (
            Published(None, "massive", OWEN, "without"),
            Published(0, "massive", OWEN, "with", magnitude="532"),
        ),
    ),
    *(
        KnownModel(
            f"Gemma-3-{size}",
            (f"google/gemma-3-{size.lower()}-pt",),
            _shape(model_type, n_layers, hidden_size),
            (
                Published(
                    0,
                    "massive",
                    OWEN,
                    magnitude="thousands",
                    note="grows from layer to layer, so emergence may call it ill-defined",
                ),
            ),
        )
        for size, model_type, n_layers, hidden_size in (
            ("1B", "gemma3_text", 26, 1152),
            ("4B", "gemma3", 34, 2560),
            ("12B", "gemma3", 48, 3840),
        )
    ),
    KnownModel(
        "Qwen3-8B",
        ("Qwen/Qwen3-8B",),
        _shape("qwen3", 36, 4096),
        (
            Published(
                6,
                "emergence",
                MU,
                note="first token, written by the MLP; the source does not say whether it counts "
                "layers from 0",
            ),
        ),
    ),
)
