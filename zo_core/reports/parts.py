"""What the four parts of a block that a scan measures are called."""

PARTS = {
    "block_output": "Block output",
    "attention_output": "Attention output",
    "mlp_output": "MLP output",
    "down_input": "Down-projection input",
}


def named(part: str) -> str:
    """A part within a sentence: "attention output", "MLP output"."""
    name = PARTS[part]
    return name if name.startswith("MLP") else name.lower()


def unit(part: str) -> str:
    """What a channel of a part is called: those of the down-projection input are neurons."""
    return "neuron" if part == "down_input" else "channel"
