"""The docs as a site: `make docs` builds it of README.md and the Markdown files beside this one, by Sphinx."""

project = "rrlhf"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "benchmarks/README.md", "docs/*.md"]
html_theme = "furo"
html_title = project
suppress_warnings = ["misc.highlighting_failure"]  # there is no lexer of JSONL, CSV and TSV
myst_heading_anchors = 4  # links to headings, as GitHub makes them
