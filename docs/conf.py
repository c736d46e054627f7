"""Sphinx: `make html` here, or `nox -s docs`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "Hyperion"
author = "the Hyperion contributors"
copyright = "the Hyperion contributors"
release = re.search(
    r'__version__ = "(.+)"', (HERE / "../hyperion/src/hyperion/__init__.py").read_text(encoding="utf-8")
)[1]  # type: ignore[index]
version = release

extensions = ["myst_parser", "sphinx_copybutton", "sphinx_design", "hyperion_docs"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build", "_ext"]
suppress_warnings = ["misc.highlighting_failure"]  # `…` in real output

html_theme = "furo"
html_title = "Hyperion"
html_static_path = ["_static"]
html_css_files = ["hyperion.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f4e8c", "color-brand-content": "#1f4e8c"},
    "dark_css_variables": {"color-brand-primary": "#9db8d9", "color-brand-content": "#9db8d9"},
    "light_logo": "logo.svg",
    "dark_logo": "logo-dark.svg",
}
html_favicon = "_static/favicon.svg"

copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True
