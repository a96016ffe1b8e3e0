"""Shows the pages that lie outside of docs/ on the site, where GitHub expects them."""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
# The files, with the names of their pages on the site.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launch/README.md": "launchers.md",
    "resnet_jax/compiler/README.md": "tpu_options.md",
}
SOURCES = {page: source for source, page in OUTSIDE.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of docs/ to the pages."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lets links lead to the pages of the site.

    A link to another file of the repository, such as LICENSE, becomes plain text.
    """
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def relink(match: re.Match) -> str:
        text, target, anchor = match.groups()
        if not target or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in OUTSIDE:
            path = f"docs/{OUTSIDE[path]}"
        if not path.startswith("docs/"):
            return text
        return f"[{text}]({path.removeprefix('docs/')}{anchor})"

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*|)\)", relink, markdown)
