"""What moves and what is left alone: as data, and as the few lines that a reader wants."""

import re
from collections import defaultdict

_WIDTH, _LINES = 100, 15


def rows(symmetries: list, left_alone: dict) -> list[dict]:
    """One row a symmetry, with its dimension in the orbit, then one for each output that is left alone, with why."""
    moving = [(s.kind, s.name, tuple(s.shape), s.dimension, None) for s in symmetries]
    staying = [("left alone", name, (), 0, reason) for name, reason in left_alone.items()]
    return [dict(zip(("kind", "name", "shape", "dimension", "reason"), row)) for row in moving + staying]


def lines(rows: list[dict]) -> list[tuple]:
    """(kind, text) of a row each; what is left alone is grouped if only numbers differ, in name and reason."""
    found, groups = [], defaultdict(list)
    for row in rows:
        if row["reason"] is None:
            size = "×".join(map(str, row["shape"])) + (f" = {row['dimension']}" if len(row["shape"]) > 1 else "")
            unit = " units" if row["kind"] == "permutation" else ""
            found.append((row["kind"], f"{short(row['name'])} {size}{unit}"))
        else:
            groups[re.sub(r"\d+", "*", f"{row['name']}: {row['reason']}")].append(row)
    stay = []
    for pattern, same in groups.items():
        if len(same) > 2:
            stay.append(f"{short(pattern)} ({len(same)} times)")
        else:
            stay += [f"{short(row['name'])}: {short(row['reason'])}" for row in same]
    found += [("left alone", f"output of {text}") for text in stay[:_LINES]]
    if len(stay) > _LINES:
        found.append(("left alone", f"and {len(stay) - _LINES} lines more: see table()"))
    dimension = sum(row["dimension"] for row in rows)
    moving = sum(row["reason"] is None for row in rows)
    return [*found, ("orbit", f"{moving} symmetries, {dimension} dimensions")]


def short(text: str) -> str:
    """Cut in the middle where it is too long for a line."""
    half = (_WIDTH - 3) // 2
    return text if len(text) <= _WIDTH else f"{text[:half]} … {text[-half:]}"
