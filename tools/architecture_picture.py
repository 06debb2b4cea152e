"""Draws ``docs/architecture.svg``: what goes from room to room, and the rooms in the order of their imports.

The order is read from the contract in ``pyproject.toml``, so the picture cannot fall behind it; a room that no box
names ends the drawing. ``python tools/architecture_picture.py`` writes it, ``tests/docs/test_key_tables.py`` compares.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, HEIGHT, BOX, TALL = 760, 640, 176, 56

#: what flows: name, place of the box's middle, rooms that do it
BOXES = {
    "config": (100, 50, "NNCF JSON, typed", "config"),
    "algorithm": (300, 50, "an algorithm, a plugin", "plugins, algorithms"),
    "model": (100, 150, "model, example input", "yours"),
    "graph": (300, 150, "groups, costs, reasons", "channels"),
    "plan": (300, 260, "PruningPlan, frozen", "decide, plan"),
    "masked": (100, 370, "masked, while it trains", "cut, controller"),
    "compact": (300, 370, "cut, compared, or undone", "cut"),
    "trained": (300, 470, "fine-tuned", "controller, accuracy_aware, integrations"),
    "files": (100, 570, "ONNX, OpenVINO; plan", "export, storage"),
    "checked": (300, 570, "served, timed, reported", "serving, report"),
}
ARROWS = [
    ("config", "algorithm", ""),
    ("model", "graph", "one run"),
    ("algorithm", "graph", ""),
    ("graph", "plan", "scores, budget"),
    ("plan", "masked", "schedule"),
    ("plan", "compact", "at once"),
    ("masked", "compact", "at the budget"),
    ("compact", "trained", ""),
    ("trained", "files", ""),
    ("files", "checked", "opened again"),
]
#: rooms that stand in the column of imports only
ALONE = {"cli", "commands", "run", "host", "errors", "version"}


def layers() -> list[str]:
    """Rooms from the top to the bottom, as the contract has them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^layers = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    lines = re.findall(r'"(.*?)"', listed)
    return [", ".join(re.findall(r"nncf_compactprune\.(\w+)", line)) for line in lines]


def drawing() -> str:
    """The picture, as SVG."""
    named = {room for _, _, _, rooms in BOXES.values() for room in rooms.split(", ")} | ALONE
    missing = {room for layer in layers() for room in layer.split(", ")} - named
    if missing:
        msg = f"no box of the picture names {', '.join(sorted(missing))}. Add it to BOXES."
        raise ValueError(msg)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img" '
        'aria-label="What goes from room to room, and the order of imports">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#445"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    parts += [_arrow(*arrow) for arrow in ARROWS]
    parts += [_box(x, y, words, rooms) for x, y, words, rooms in BOXES.values()]
    parts.append('<text x="592" y="22" font-size="13" text-anchor="middle" fill="#445">Imports point down</text>')
    for at, layer in enumerate(layers()):
        y = 34 + at * 35
        parts.append(f'<rect x="450" y="{y}" width="284" height="28" rx="4" fill="#eef" stroke="#99b"/>')
        parts.append(
            f'<text x="592" y="{y + 19}" font-size="13" text-anchor="middle" fill="#223">{escape(layer)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(x: int, y: int, words: str, rooms: str) -> str:
    place = f'x="{x - BOX // 2}" y="{y - TALL // 2}" width="{BOX}" height="{TALL}"'
    size = 11 if len(rooms) < 30 else 9
    return (
        f'<rect {place} rx="6" fill="#f7f9ff" stroke="#3949ab" stroke-width="1.5"/>'
        f'<text x="{x}" y="{y - 4}" font-size="13" text-anchor="middle" fill="#223">{escape(words)}</text>'
        f'<text x="{x}" y="{y + 15}" font-size="{size}" text-anchor="middle" fill="#3949ab">{escape(rooms)}</text>'
    )


def _arrow(start: str, end: str, words: str) -> str:
    (x1, y1, *_), (x2, y2, *_) = BOXES[start], BOXES[end]
    if y1 == y2:
        x1, x2 = (x1 + BOX // 2, x2 - BOX // 2) if x1 < x2 else (x1 - BOX // 2, x2 + BOX // 2)
    else:
        y1, y2 = y1 + TALL // 2, y2 - TALL // 2
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#445" stroke-width="1.5" marker-end="url(#tip)"/>'
    if not words:
        return line
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    beside = f'x="{x + 8:.0f}" y="{y + 4:.0f}"' if x1 == x2 else f'x="{x:.0f}" y="{y - 34:.0f}" text-anchor="middle"'
    if x1 != x2 and y1 != y2:
        beside = f'x="{x - 14:.0f}" y="{y:.0f}" text-anchor="end"'
    return f'{line}<text {beside} font-size="11" fill="#445">{escape(words)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="utf-8")
    print(f"{PICTURE.relative_to(ROOT)}: written anew")
