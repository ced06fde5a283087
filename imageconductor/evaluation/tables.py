"""Cells of figures with their intervals, and tables of cells in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_tables(tables: Sequence[Sequence[Sequence[str]]]) -> str:
    """Tables of cells, each line by line with the heading first, in Markdown."""
    texts = []
    for heading, *body in tables:
        lines = ["| " + " | ".join(line) + " |" for line in (heading, *body)]
        texts.append("\n".join([lines[0], "|---" * len(heading) + "|", *lines[1:]]))
    return "\n\n".join(texts)


def format_figure(figure: dict[str, Any] | None, digits: int = 2, sign: str = "", count: int | None = None) -> str:
    """Mean and interval; the number of videos behind it where that is not `count`."""
    if figure is None or figure["mean"] is None:
        return "–"
    low, high = figure["low"], figure["high"]
    text = f"{figure['mean']:{sign}.{digits}f}"
    if low is not None:
        text += f" ({low:{sign}.{digits}f} .. {high:{sign}.{digits}f})"
    return text if count in (None, figure["n"]) else f"{text}, n = {figure['n']}"


def format_scaled(
    figure: dict[str, Any] | None, factor: float, digits: int = 2, sign: str = "", count: int | None = None
) -> str:
    """As `format_figure`, of mean and interval times a factor."""
    if figure is None:
        return format_figure(None)
    scaled = {key: factor * figure[key] for key in ("mean", "low", "high") if figure[key] is not None}
    return format_figure(figure | scaled, digits, sign, count)
