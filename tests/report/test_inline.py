"""Pictures as parts of a page."""

from __future__ import annotations

from fedfuse.report.inline import inline_svg

SVG = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="75pt" height="30pt"
 viewBox="0 0 75 30" version="1.1"><metadata>m</metadata><defs><style type="text/css">*{}</style></defs>
<g id="axes_1"><path id="mark" clip-path="url(#clip)" style="fill: #0072B2; stroke: #1f2a37"/>
<use xlink:href="#mark"/><text style="font: 10px 'DejaVu Sans', sans-serif">a &lt; b &amp; c</text></g></svg>"""


def test_names_get_a_prefix_colours_follow_the_page_and_text_stays_escaped() -> None:
    out = inline_svg(SVG, "pic", 'says "so"')
    assert out.startswith("<svg")
    for part in (
        'id="pic-axes_1"',
        'id="pic-mark"',
        'clip-path="url(#pic-clip)"',
        'href="#pic-mark"',
        "fill: var(--series-0); stroke: var(--ink)",
        "font: 10px var(--font)",
        "a &lt; b &amp; c",
        'aria-label="says &quot;so&quot;"',
        'role="img"',
        'style="width: 100px"',
    ):
        assert part in out
    for part in ("<style", "metadata", "xlink", "DOCTYPE", "75pt"):
        assert part not in out
