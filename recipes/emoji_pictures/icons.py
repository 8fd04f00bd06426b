"""Renders the icons of a set: an npm package of Iconify, with the SVG of each icon in icons.json."""

from __future__ import annotations

import io

import resvg_py
from PIL import Image

OVERSAMPLING = 4  # thin lines become smoother than resvg's own antialiasing makes them


class IconError(ValueError):
    """An icon that cannot be rendered."""


class IconSet:
    """The icons of a set, by their keys.

    Args:
        name: The name of the set, for errors.
        icons: The content of its icons.json.
    """

    def __init__(self, name: str, icons: dict):
        self.name, self.size = name, {side: icons[side] for side in ("width", "height")}
        same = {key: alias["parent"] for key, alias in icons.get("aliases", {}).items() if alias.keys() == {"parent"}}
        self.icons = icons["icons"]
        self.icons |= {key: self.icons[parent] for key, parent in same.items() if parent in self.icons}

    def __contains__(self, key: str) -> bool:
        return key in self.icons

    def picture(self, key: str, size: int) -> Image.Image:
        """An icon on white, as an RGB image of size x size pixels; one that is not square is centred.

        Raises:
            IconError: Its SVG cannot be rendered.
        """
        icon = self.size | self.icons[key]
        width, height = icon["width"], icon["height"]
        side = max(width, height)
        box = f"{icon.get('left', 0) - (side - width) / 2} {icon.get('top', 0) - (side - height) / 2} {side} {side}"
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {namespaces} viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'
        pixels = size * OVERSAMPLING
        try:  # without the machine's fonts, so that a picture is the same everywhere
            png = resvg_py.svg_to_bytes(svg, width=pixels, height=pixels, background="white", skip_system_fonts=True)
        except ValueError as error:
            raise IconError(f"{self.name}: the SVG of {key!r} cannot be rendered: {error}") from error
        return Image.open(io.BytesIO(png)).convert("RGB").reduce(OVERSAMPLING)
