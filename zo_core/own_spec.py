"""Template and words of the user's own task: reading what was typed, refusing what cannot work."""

from string import Formatter


def parse_verbalizers(text: str) -> dict[str, str]:
    """``0=terrible,1=great`` as a dict.

    Raises:
        ValueError: a part is not ``label=word``, or a label comes twice.
    """
    found: dict[str, str] = {}
    for part in text.split(","):
        label, equals, word = (piece.strip() for piece in part.partition("="))
        if not (label and equals and word):
            raise ValueError(f"has {part.strip()!r}: write label=word, as 0=terrible,1=great")
        if label in found:
            raise ValueError(f"name the label {label!r} twice")
        found[label] = word
    return found


def check_template(template: str) -> None:
    """Refuse a template whose fields cannot be read.

    Raises:
        ValueError: a stray brace, something beside a name in braces, or no field at all.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError("has a single brace: write {{ or }} for a brace in the text") from error
    names = [name for _, name, _, _ in parts if name is not None]
    if any(
        not n.strip() or spec or conversion for _, n, spec, conversion in parts if n is not None
    ):
        raise ValueError("has braces that hold more or less than a field's name: write {sentence}")
    if any(c in name for name in names for c in ".[]"):
        raise ValueError("can use plain fields only: no dot or bracket within the braces")
    if not names:
        raise ValueError('names no field: write one in braces, as "{sentence} It was"')
