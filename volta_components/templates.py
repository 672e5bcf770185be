# SPDX-License-Identifier: Apache-2.0
"""Jinja templates that lie beside the code that fills them."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def template_environment(package: str, is_html: bool = False) -> Environment:
    """Templates of a package's folder ``templates``; a name that is not given is an error."""
    return Environment(
        loader=PackageLoader(package),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
