"""Model page: the way through the app, and which model to look at in which precision."""

import re
from pathlib import Path

import pandas as pd
import streamlit as st

from pages.parts import history, launch, run_view
from pages.parts.choice import Choice, current, describe, remember
from pages.parts.device_memory import Device, dtype_of, gpus
from pages.parts.frame import begin
from pages.parts.links import button_link
from pages.parts.routes import PAGES
from pages.parts.words import count, layer_name, plain, size
from zo_core import backend
from zo_core.jobs import LoadJob, UnloadJob
from zo_core.models.catalog import ModelInfo
from zo_core.models.memory import MemoryEstimate, estimate

SOURCES = {"bundled": "Bundled demo", "hub": "Hugging Face hub", "local": "Local folder"}
HUB_ADDRESS = re.compile(r"^https?://(www\.)?(huggingface\.co|hf\.co)/")
DTYPES = ("float32", "bfloat16", "float16")
USES = {
    "weights": "Weights",
    "scan": "Scan",
    "probe": "Probe",
    "tune_layer": "Tune one layer",
    "tune_full": "Tune all layers",
}


def steps(choice: Choice, info: ModelInfo | None) -> None:
    """The three steps of the work on the chosen model, each with what is known so far."""
    n_layers = info.n_layers if info else 0
    layer, scan = history.outlier_layer(choice)
    probe = history.of_model("probe", choice, done=True)
    tune = history.of_model("tune", choice, done=True)
    if scan is None:
        found = "Find the layer where massive activations first appear. Takes seconds."
    elif layer is None:
        found = "Scanned: no first outlier layer by the emergence rule."
    else:
        found = f"First outlier layer: **{layer_name(layer, n_layers or layer + 1)}**"
    sensitive = probe.summary.get("most_sensitive_layer") if probe else None
    probed = len(probe.summary.get("layers") or []) if probe else 0
    cards = (
        ("1 · Scan", "outliers", "Outliers", found, scan),
        (
            "2 · Probe",
            "sensitivity",
            "Sensitivity",
            "Perturb one layer at a time and measure how much the loss moves."
            if sensitive is None
            else f"Largest mean |g| of the {probed} probed layers: "
            f"**{layer_name(sensitive, n_layers or sensitive + 1)}**",
            probe,
        ),
        (
            "3 · Tune",
            "fine_tune",
            "Fine-tune",
            "Tune the dominant layer with zeroth-order SGD: forward passes only."
            if tune is None
            else f"Scope {plain(tune.scope)}: {tune.key_result}",
            tune,
        ),
    )
    upcoming = next((i for i, card in enumerate(cards) if card[4] is None), None)
    for i, (column, (title, page, label, text, entry)) in enumerate(
        zip(st.columns(3), cards, strict=True)
    ):
        with column.container(border=True, height="stretch", key=f"step_{page}"):
            st.markdown(f"**{title}**" + (" :green[:material/check:]" if entry else ""))
            st.markdown(text)
            icon = ":material/arrow_forward:"
            button_link(PAGES[page], label, f"open_{page}", icon, primary=i == upcoming)


def pick(choice: Choice) -> Choice:
    """The fields that name a model; what is typed is kept for all pages."""
    local = choice.model.startswith(("/", ".", "~"))
    given = "bundled" if choice.model == "demo" else "local" if local else "hub"
    source = st.segmented_control(
        "Source",
        list(SOURCES),
        format_func=SOURCES.get,
        default=given,
        key="model_source",
        required=True,
    )
    model, revision, missing = "demo", None, ""
    if source == "hub":
        with st.container(horizontal=True):
            model = st.text_input(
                "Hub id",
                choice.model if given == "hub" else "",
                key="model_hub_id",
                placeholder="Qwen/Qwen3-0.6B",
                max_chars=512,
            )
            revision = st.text_input(
                "Revision",
                choice.revision or "",
                key="model_revision",
                placeholder="main",
                width=180,
                max_chars=128,
            )
        model = HUB_ADDRESS.sub("", model.strip()).strip("/")
        missing = "" if model else "Type a hub id."
    elif source == "local":
        model = st.text_input(
            "Folder on the engine's machine",
            choice.model if given == "local" else "",
            key="model_path",
            placeholder="/models/llama-2-7b, with config.json and *.safetensors",
            max_chars=512,
        )
        model, missing = folder(model.strip())
    else:
        st.caption(
            "A LLaMA-style model of 15 M parameters with 16 layers, trained for this project. It "
            "has real massive activations and runs on any CPU, offline."
        )
    if missing:
        model, revision = choice.model, choice.revision
        st.info(f"{missing} Until then the model is still **{plain(choice.label)}**.")
    devices = ["auto", "cpu", *sorted({w["device"] for w in gpus()})]
    if choice.device not in devices:
        devices.append(choice.device)
    dtypes = list(dict.fromkeys(["auto", *DTYPES, choice.dtype]))
    with st.container(horizontal=True):
        dtype = st.selectbox(
            "Precision",
            dtypes,
            dtypes.index(choice.dtype),
            key="model_dtype",
            width=220,
            help="auto: float32 on a CPU, bfloat16 on a GPU",
        )
        device = st.selectbox(
            "Device",
            devices,
            devices.index(choice.device),
            key="model_device",
            width=220,
            help="auto: a GPU if there is one",
        )
    return Choice(
        model=model,
        revision=(revision or "").strip() or None,
        dtype=dtype,
        device=device,
    )


def folder(typed: str) -> tuple[str, str]:
    """A typed folder as an absolute path, or the sentence that says what is missing."""
    if not typed:
        return "", "Type a folder."
    try:
        path = Path(typed).expanduser().resolve()
        if path.is_dir():
            return str(path), ""
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a null byte
        pass
    return "", f"There is no folder {plain(typed)}."


def memory(choice: Choice, info: ModelInfo) -> None:
    """What each use needs in each precision, against what the worker has free."""
    device, dtype = Device.of(choice), dtype_of(choice)
    needs: dict[str, MemoryEstimate] = {
        d: estimate(info, d, device_bytes=device.gpu_bytes) for d in DTYPES
    }
    st.dataframe(
        pd.DataFrame(
            [
                {"In total for": title}
                | {
                    f"{d} (chosen)" if d == dtype else d: size(getattr(needs[d], use))
                    for d in DTYPES
                }
                for use, title in USES.items()
            ]
        ),
        hide_index=True,
        key="memory_table",
    )
    free = device.free
    if free is None:
        st.caption("How much memory the worker has free is not known yet.")
        return
    short = [
        f"{title.lower()} needs {size(getattr(needs[dtype], use))}"
        for use, title in USES.items()
        if getattr(needs[dtype], use) > free
    ]
    if not short:
        st.caption(f"Everything fits: {size(free)} free on the worker.")
        return
    smaller = dtype == "float32" and needs["bfloat16"].weights <= free
    st.warning(
        f"Does not fit: {', '.join(short)}; {size(free)} free on the worker. "
        + ("Try bfloat16." if smaller else "Unload other models, or choose a smaller model."),
        icon=":material/memory:",
    )


def memory_once_known(choice: Choice, info: ModelInfo) -> None:
    """The same, and the page once more when the worker has said what it has."""
    known = Device.of(choice).free is not None

    def tick() -> None:
        memory(choice, info)
        if not known and Device.of(choice).free is not None:
            st.rerun()  # the list of devices, too

    st.fragment(tick, run_every=None if known else 2.0)()


def architecture(info: ModelInfo) -> None:
    """What the model is, from its configuration and weight headers."""
    heads = f"{info.n_heads}" if info.n_heads else "not stated"
    if info.n_heads and info.n_kv_heads and info.n_kv_heads != info.n_heads:
        heads += f" (key-value {info.n_kv_heads})"
    bos = {True: "has one", False: "none", None: "not stated"}[info.has_bos]
    rows = {
        "Architecture": f"{info.architecture} ({info.model_type})",
        "Parameters": f"{info.parameters:,}",
        "Decoder layers": f"{info.n_layers}, numbered 0 to {info.n_layers - 1}",
        "Parameters of a layer": f"{info.layer_parameters:,} "
        f"({100 * info.layer_parameters / info.parameters:.1f} %)",
        "Hidden size": f"{info.hidden_size:,}",
        "MLP size": f"{info.intermediate_size:,}" if info.intermediate_size else "not stated",
        "Attention heads": heads,
        "Vocabulary": f"{info.vocab_size:,}" + (" (tied)" if info.tied_embeddings else ""),
        "Context": f"{info.context:,} tokens" if info.context else "not stated",
        "BOS token": bos,
        "Stored as": info.stored_dtype,
        "Read from": info.path,
    }
    st.dataframe(
        pd.DataFrame({"Property": list(rows), "Value": list(rows.values())}),
        hide_index=True,
        height="content",
        key="architecture_table",
    )


def loading(choice: Choice) -> None:
    """Load and unload, and what is resident."""
    resident = [m for w in backend.workers() for m in w.get("resident") or []]
    if resident:
        st.markdown("Resident on the worker")
        st.dataframe(
            pd.DataFrame(
                [
                    {
                        "Model": m.get("model"),
                        "Revision": m.get("revision") or "",
                        "Precision": m.get("dtype"),
                        "Parameters": count(m.get("parameters") or 0),
                        "Memory": size(m.get("bytes") or 0),
                    }
                    for m in resident
                ]
            ),
            hide_index=True,
            key="resident_table",
        )
    else:
        st.caption("No model is resident. Jobs load the model themselves; loading is optional.")
    launch.launch_row(LoadJob, choice.fields(), "Load", key="load_model")
    if resident and st.button("Unload all", key="unload_models", icon=":material/eject:"):
        launch.submit(UnloadJob())
    shown = next(iter(history.entries(("load", "unload"))), None)
    if shown and (shown.status.live or shown.status.state == "failed"):
        run_view.follow(shown, lambda entry: None, every=0.5)


begin(
    "ZOScope",
    "See which decoder layer dominates zeroth-order fine-tuning of a language model, and tune that "
    "layer.",
)
choice = current()
info, problem = describe(choice)
steps(choice, info)
st.header("Model", anchor=False)
# Side by side where there is room, below each other where there is not.
with st.container(horizontal=True, gap="medium"):
    left = st.container(width=480, key="model_picker")
    right = st.container(width=480, key="model_facts")
with left:
    chosen = pick(choice)
    if chosen != choice:
        remember(chosen)
        st.rerun()  # the steps above show the new model
    if info is not None:
        st.subheader("Memory needed", anchor=False)
        memory_once_known(choice, info)
        st.subheader("Load", anchor=False)
        loading(choice)
with right:
    if info is None:
        st.error(plain(problem), icon=":material/error:")
    else:
        st.subheader(
            f"{plain(choice.label)} · {count(info.parameters)} parameters · {info.n_layers} layers",
            anchor=False,
        )
        architecture(info)
