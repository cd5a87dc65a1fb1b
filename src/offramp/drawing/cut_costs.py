"""Costs of each cut of a network, drawn as bars: edge, link and cloud."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from offramp.offload.plan import CutCost, best_cut

_ROW, _BAR, _LEFT, _WIDE, _RIGHT = 34, 20, 120, 480, 120
"""Heights and widths in pixels: a cut, its bar, the names, the longest bar, the figures."""
_COLOURS = {"edge": (44, 123, 182), "link": (253, 174, 97), "cloud": (171, 217, 233)}
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_bars(cuts: Sequence[CutCost]) -> Image.Image:
    """Draw the mean latency of every cut."""
    best, longest = best_cut(cuts), max(cut.mean_ms for cut in cuts)
    picture = Image.new("RGB", (_LEFT + _WIDE + _RIGHT, _ROW * (len(cuts) + 1)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for row, cut in enumerate(cuts):
        top = row * _ROW + (_ROW - _BAR) // 2
        name = "all in the cloud" if cut.split_after == -1 else f"split_after {cut.split_after}"
        draw.text((6, top + 4), "all on the edge" if cut.codec is None else name, fill=_INK)
        left = float(_LEFT)
        for colour, ms in zip(
            _COLOURS.values(), (cut.edge_ms, cut.link_ms, cut.cloud_ms), strict=True
        ):
            right = left + _WIDE * ms / longest
            draw.rectangle((left, top, right, top + _BAR), fill=colour)
            left = right
        said = f"{cut.mean_ms:.1f} ms" + (", best" if cut is best else "")
        draw.text((left + 6, top + 4), said, fill=_INK)
    left = _LEFT
    for name, colour in _COLOURS.items():
        top = _ROW * len(cuts) + 6
        draw.rectangle((left, top, left + 12, top + 12), fill=colour)
        draw.text((left + 18, top), name, fill=_INK)
        left += 80
    return picture
