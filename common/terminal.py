"""What is printed where the terminal's encoding lacks the papers' symbols: φ becomes phi, ± becomes +/-."""

import codecs
import os
import sys
import unicodedata

_PLAIN = {
    "∂": "d", "∇": "grad ", "∫": "int ", "√": "sqrt", "‖": "||", "⟨": "<", "⟩": ">", "−": "-", "–": "-", "±": "+/-",
    "×": "x", "÷": "/", "·": "*", "⊙": "*", "∘": "o", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~", "∈": "in", "∞": "inf",
    "→": "->", "←": "<-", "↦": "->", "′": "'", "…": "...", "⋯": "...", "ᵀ": "^T", "ˣ": "^x", "⁻": "^-", "¹": "^1",
    "²": "^2", "³": "^3", "½": "1/2", "°": " deg", "µ": "u", "ß": "ss", "∝": "~", "⊥": "_|_",
    "∥": "||", "≪": "<<", "≫": ">>",
}  # fmt: skip


def plain(text: str, encoding: str = "ascii") -> str:
    """text with what `encoding` lacks written otherwise, in ASCII."""
    return text.encode(encoding, _register()).decode(encoding)


def accept_any_symbol() -> None:
    """From now on no character that is printed, to stdout or stderr, ends in a UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a test or a notebook put in its place
            stream.reconfigure(errors=_register())


def forget_output() -> None:
    """Drop what cannot be written to stdout: Python tries once more at its end, which would be a second complaint."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _register() -> str:
    codecs.register_error("teleport.plain", _replace)
    return "teleport.plain"


def _replace(error: UnicodeEncodeError) -> tuple[str, int]:
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(symbol: str) -> str:
    name = unicodedata.name(symbol, "")
    if symbol in _PLAIN:
        return _PLAIN[symbol]
    if name.startswith("GREEK SMALL LETTER ") or name.startswith("GREEK CAPITAL LETTER "):
        letter = name.split()[3]
        return letter.lower() if "SMALL" in name else letter.title()
    decomposed = unicodedata.normalize("NFKD", symbol).encode("ascii", "ignore").decode()
    return decomposed or ("" if unicodedata.combining(symbol) else "?")
