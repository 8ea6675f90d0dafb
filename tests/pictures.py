"""Looks at a picture as a reader sees it: which texts there are, and what of it lies outside or overlaps. No torch."""

from __future__ import annotations

from xml.etree.ElementTree import Element

SVG = "{http://www.w3.org/2000/svg}"
# Widths in ems of DejaVu Sans, one of the widest fonts that a reader without Helvetica or Arial gets.
WIDTHS = {
    letter: width
    for width, letters in {
        0.28: "ijl'",
        0.32: ",. ",
        0.34: "/:;|",
        0.36: "f-",
        0.39: "()",
        0.4: "t",
        0.42: "r",
        0.53: "sz",
        0.55: "c",
        0.58: "kF",
        0.6: "vxy",
        0.62: "aeo",
        0.84: "+=#",
        0.82: "w",
        0.95: "%",
        0.98: "m",
        0.99: "W",
    }.items()
    for letter in letters
}


def width_of(text: str, size: float, *, bold: bool = False) -> float:
    """Pixels of a text in DejaVu Sans; 0.64 em, or 0.79 for a capital, where the letter is not in the table."""
    plain = sum(WIDTHS.get(letter, 0.79 if letter.isupper() else 0.64) for letter in text)
    return plain * size * (1.12 if bold else 1.0)


def texts(picture: Element) -> list[tuple[str, tuple[float, float, float, float], bool]]:
    """Every text, its box (left, top, right, bottom), and whether it is bold."""
    found = []
    for element in picture.iter(f"{SVG}text"):
        text, size, x, y = element.text or "", *(float(element.attrib[key]) for key in ("font-size", "x", "y"))
        bold = element.get("font-weight") == "bold"
        wide = width_of(text, size, bold=bold)
        left = x - wide * {"middle": 0.5, "end": 1.0}.get(element.get("text-anchor", "start"), 0.0)
        found.append((text, (left, y - 0.76 * size, left + wide, y + 0.24 * size), bold))
    return found


def faults(picture: Element) -> list[str]:
    """Texts and boxes that lie outside of the picture, and texts on top of each other."""
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    boxes = [(text, box) for text, box, _ in texts(picture)]
    bad = []
    for element in picture.findall(f"{SVG}rect"):
        x, y, wide, high = (float(element.get(key, 0)) for key in ("x", "y", "width", "height"))
        boxes.append((f"a box at {x:.0f},{y:.0f}", (x, y, x + wide, y + high)))
    for name, (left, top, right, bottom) in boxes:
        if left < 0 or top < 0 or right > width or bottom > height:
            bad.append(f"{name!r} at {left:.0f} to {right:.0f}, {top:.0f} to {bottom:.0f} in {width:g} x {height:g}")
    lines: dict[float, list[tuple[float, float, str]]] = {}
    for text, (left, top, right, bottom), _ in texts(picture):
        # A cell's number may reach over its cell's edge by a hair in so wide a font.
        lines.setdefault((top + bottom) // 8, []).append((left, right - 2, text))
    for line in lines.values():
        line.sort()
        bad += [f"{a[2]!r} runs into {b[2]!r}" for a, b in zip(line, line[1:], strict=False) if a[1] > b[0]]
    return bad
