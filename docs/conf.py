"""Settings of Sphinx, which makes a web site of the pages: `make docs`. The pages are plain Markdown without it.

The source folder is that of the repository, so that links to code and to measurements work in both places.
"""

import re

project = "WikiLLM"
extensions = ["myst_parser"]
root_doc = "docs/index"
source_suffix = {".md": "markdown"}
include_patterns = ["README*.md", "CONTRIBUTING*.md", "CHANGELOG.md", "docs/*.md", "benchmarks/*.md"]
html_theme = "furo"
html_title = "WikiLLM"
html_copy_source = False
myst_heading_anchors = 3
_FOLDER_LINKS = ("../launch/kubernetes",)
"""Links to folders, which only a repository's site can show."""


def _add_contents(app, docname: str, source: list[str]) -> None:
    """Add the list from which the theme makes its menu: the pages that the index lists, and some outside of docs."""
    suffix = {"docs/index": "", "docs/index.zh": ".zh"}.get(docname)
    if suffix is not None:
        pages = re.findall(r"^\* \[.*\]\(([\w.-]+)\.md\)$", source[0], re.M)
        pages += [f"../{name}" for name in ("CONTRIBUTING.zh" if suffix else "CONTRIBUTING", "CHANGELOG")]
        if not suffix:
            pages += [f"../benchmarks/{name}" for name in ("README", "reliability", "leaderboard")]
            pages += ["../README", "../README.zh", "index.zh"]
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(pages) + "\n```\n"


def _drop_folder_links(app, docname: str, source: list[str]) -> None:
    """Leave only the text of links to folders."""
    for folder in _FOLDER_LINKS:
        source[0] = source[0].replace(f"]({folder})", "]")


def _turn_anchors_into_targets(app, docname: str, source: list[str]) -> None:
    """Write the anchors that GitHub reads in the form that Sphinx reads."""
    label = docname.replace("/", "-")
    text, anchors = re.subn(r'^<a id="([\w-]+)"></a>$', rf"({label}-\1)=", source[0], flags=re.M)
    if anchors:
        source[0] = re.sub(r"\]\(#([\w-]+)\)", rf"](#{label}-\1)", text)


def setup(app) -> None:
    """Connect the changes of the source."""
    app.connect("source-read", _add_contents)
    app.connect("source-read", _drop_folder_links)
    app.connect("source-read", _turn_anchors_into_targets)
