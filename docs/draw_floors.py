"""Draw the floors of the code, from the layers that import-linter holds and from the imports.

    python docs/draw_floors.py    # writes docs/floors.svg

A floor may import from those below it only. Beside its name stand its modules, and the floors that
it does import from.
"""

import ast
import sys
from html import escape
from pathlib import Path
from textwrap import wrap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PICTURE = ROOT / "docs" / "floors.svg"
OLD_PLACES = "offramp.inference"
WIDTH, LINE, PAD, NAMES = 940, 17, 9, 96
"""Sizes in pixels, and characters of module names that fit in a line."""


def layers() -> list[list[str]]:
    """Packages and modules of each floor, from the highest to the lowest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    floors = next(c["layers"] for c in contracts if c["type"] == "layers")
    rooms = [[room.strip() for room in floor.split("|")] for floor in floors]
    return [[room for room in floor if room != OLD_PLACES] for floor in rooms]


def modules_of(room: str) -> list[Path]:
    """Source files of a package, or of a module."""
    path = SOURCE.joinpath(*room.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imports_of(room: str) -> set[str]:
    """Rooms that a room imports from, itself left out."""
    found = set()
    for file in modules_of(room):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("offramp."):
                found.add(".".join(str(node.module).split(".")[:2]))
    return found - {room}


def names_in(room: str) -> list[str]:
    """Names of a package's modules, those of packages inside it with their folder."""
    folder = SOURCE.joinpath(*room.split("."))
    if not folder.is_dir():
        return []
    paths = [path.relative_to(folder).with_suffix("") for path in modules_of(room)]
    return [path.as_posix() for path in paths if path.name != "__init__"]


def draw() -> str:
    """The picture, as SVG."""
    rooms = [room for floor in layers() for room in floor]
    parts, top = [], PAD
    for room in rooms:
        imported = imports_of(room)
        below = [other.split(".")[1] for other in rooms if other in imported]
        lines = [("modules", line) for line in wrap("  ".join(names_in(room)), NAMES)]
        if below:
            words = "  ".join(["imports from:", *below])
            lines += [("imports", line) for line in wrap(words, NAMES)]
        height = LINE * max(1, len(lines)) + 2 * PAD
        parts.append(
            f'<rect x="{PAD}" y="{top}" width="{WIDTH - 2 * PAD}" height="{height}" rx="5" '
            'fill="#f4f6fa" stroke="#8795ad"/>'
        )
        name = room.removeprefix("offramp.")
        parts.append(f'<text x="{2 * PAD}" y="{top + PAD + 12}" class="name">{name}</text>')
        for index, (kind, line) in enumerate(lines):
            y = top + PAD + 12 + index * LINE
            parts.append(f'<text x="150" y="{y}" class="{kind}">{escape(line)}</text>')
        top += height + PAD
    style = (
        "text{font:13px ui-monospace,monospace;fill:#1c2536}.name{font-weight:bold}"
        ".imports{fill:#5b6b86;font-style:italic}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}">'
    background = f'<rect width="{WIDTH}" height="{top}" fill="white"/>'
    return "\n".join([head, f"<style>{style}</style>", background, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
