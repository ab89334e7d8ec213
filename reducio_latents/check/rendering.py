"""The templates of this room, filled in. Pages escape whatever is put into them."""

from __future__ import annotations

import base64
from typing import Any

from reducio_latents.core.libraries import import_library

jinja2 = import_library("jinja2", "a report", extra="encode")  # told before clips are decoded


def render_template(template: str, /, **values: Any) -> str:
    """Return `templates/TEMPLATE` with `values`; a value that is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reducio_latents.check"),
        autoescape=lambda name: ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    text: str = environment.get_template(template).render(**values)
    return text
