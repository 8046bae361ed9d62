"""The word somebody meant, and numbers as they should have been written."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of `words`, or None when none is close. `_` and `-` count as the same letter."""
    plain = {w.lower().replace("_", "-"): w for w in words}
    found = difflib.get_close_matches(word.lower().replace("_", "-"), plain, 1, cutoff)
    return plain[found[0]] if found else None


def near_stage(name: str, names: Iterable[str]) -> str | None:
    """Like `near`, for `kind/method`: a method under the wrong kind, or without one, is found too."""
    names = list(names)
    if found := near(name, names, 0.75):
        return found
    method = name.rpartition("/")[2]
    by_method = {n.rpartition("/")[2]: n for n in reversed(names)}
    match = near(method, by_method, 0.7)
    return by_method[match] if match else near(name, names, 0.6)


def did_you_mean(word: str | None, otherwise: str | None = None) -> str | None:
    """A hint that offers `word`, or `otherwise` when there is none."""
    return f"did you mean `{word}`?" if word else otherwise


def as_number(text: str, whole: bool) -> str | None:
    """How YAML wants the number somebody wrote as text: `1e-2` -> `1.0e-2`, `1_000` -> `1000`.

    None when the text is no number, or no whole one where `whole` is asked for.
    """
    compact = text.strip().replace("_", "").replace(",", "").replace(" ", "")
    try:
        return str(int(compact, 0) if compact[:2].lower() in ("0x", "0o", "0b") else int(compact))
    except ValueError:
        pass
    try:
        value = float(compact)
    except ValueError:
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return None
    if whole:
        return str(int(value)) if value.is_integer() else None
    return _with_point(compact)


def _with_point(number: str) -> str:
    """`1e-2` -> `1.0e-2`, `1.5e3` -> `1.5e+3`: YAML 1.1 wants a point and a sign."""
    mantissa, _, exponent = number.lower().partition("e")
    if "." not in mantissa:
        mantissa += ".0"
    if not exponent:
        return mantissa
    return f"{mantissa}e{exponent if exponent[0] in '+-' else '+' + exponent}"
