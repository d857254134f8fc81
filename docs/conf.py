"""Sphinx: `make docs` builds these pages into build/docs, and every warning is an error."""

import os
from importlib import metadata
from typing import Any

import torch
from docutils import nodes
from docutils.parsers.rst import Directive
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx_gallery.scrapers import figure_rst
from typer.testing import CliRunner

project, author = "lnr-prune", "the lnr-prune authors"
release = version = metadata.version("lnr-prune")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["tutorials"]  # the gallery is made of them
default_role = "py:obj"  # `name` in docstrings
highlight_language = "none"
html_theme = "furo"
html_title = "lnr-prune"
html_copy_source = False
html_show_copyright = False
html_static_path = ["style.css"]
html_css_files = ["style.css"]
suppress_warnings = ["config.cache"]  # the gallery's settings hold a function

myst_heading_anchors = 3
autodoc_member_order = "bysource"
napoleon_use_ivar = True

SHOWN: list[Figure] = []  # figures that the gallery has


def figures(block: Any, variables: dict[str, Any], configuration: dict[str, Any]) -> str:
    """New figures among a script's variables: those of lnr_prune are not pyplot's."""
    paths = []
    for figure in variables["example_globals"].values():
        if isinstance(figure, Figure) and not any(figure is old for old in SHOWN):
            SHOWN.append(figure)
            paths.append(next(variables["image_path_iterator"]))
            figure.savefig(paths[-1], dpi=110)
    return str(figure_rst(paths, configuration["src_dir"]))


sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/\d_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": (figures,),
    "capture_repr": ("_repr_html_",),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
}


class Help(Directive):
    """What ``lnr-prune COMMAND --help`` prints."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        from lnr_prune.cli.main import app

        result = CliRunner().invoke(app, [*self.arguments, "--help"], prog_name="lnr-prune")
        return [nodes.literal_block("", result.output.strip(), language="none")]


def setup(app: Sphinx) -> None:
    """Registers the directive; everything runs on one thread."""
    os.environ["TERMINAL_WIDTH"] = "90"
    torch.set_num_threads(1)
    app.add_directive("help", Help)
