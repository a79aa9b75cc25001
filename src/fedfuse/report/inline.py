"""Pictures made part of a page: SVG without names that clash, in colours that follow the page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from fedfuse.report.plots import style

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"

# Colour of the house style -> CSS variable of the page.
VARIABLES = {
    style.INK: "--ink",
    style.MUTED: "--muted",
    style.GRID: "--grid",
    style.PAPER: "--paper",
    style.QUIET: "--quiet",
    **{colour: f"--series-{index}" for index, colour in enumerate(style.PALETTE)},
}
_COLOUR = re.compile("|".join(VARIABLES), re.IGNORECASE)
_FONT = re.compile(r"'DejaVu Sans'(, *sans-serif)?")


def inline_svg(svg: str, name: str, description: str) -> str:
    """Make an SVG file part of an HTML page.

    Args:
        svg: as :func:`~fedfuse.report.plots.style.save_figure` writes it.
        name: of the picture, unique on the page; its ids begin with it.
        description: what a reader who cannot see the picture is told.

    Returns:
        One ``svg`` element, every text in it escaped.
    """
    root = ElementTree.fromstring(svg)
    for unwanted in (f"{{{SVG}}}metadata", f"{{{SVG}}}title"):
        for element in root.findall(unwanted):
            root.remove(element)
    for parent in list(root.iter()):
        # A style element would hold for the whole page; its one rule is part of the page's own style.
        for element in parent.findall(f"{{{SVG}}}style"):
            parent.remove(element)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == XLINK:
                del element.attrib[key]
                element.set("href", f"#{name}-{value[1:]}" if value.startswith("#") else value)
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
            elif key == "style":
                themed = _COLOUR.sub(lambda match: f"var({VARIABLES[match.group().lower()]})", value)
                element.set(key, _FONT.sub("var(--font)", themed))
    width = root.get("viewBox", "0 0 600 400").split()[2]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    # Points become pixels at the size that the letters were chosen for.
    root.set("style", f"width: {float(width) * 96 / 72:.0f}px")
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", SVG)
    return ElementTree.tostring(root, encoding="unicode")
