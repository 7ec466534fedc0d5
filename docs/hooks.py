"""Hooks that turn this repository's pages into a site; `mkdocs.yml` names this file.

People also read the pages in an editor or on a code host. So the README is the site's first page, and the hooks adapt
links between folders and lists of a page's own headings, which only such a reader needs.
"""

from __future__ import annotations

import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A unit test imports this file, in an environment without MkDocs.
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
# A file outside of docs/ → the page that it becomes.
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
# A page of the API reference → its title and the package whose public names it describes.
REFERENCES = {
    "api.md": ("Python interface", "composite_logstore"),
    "api-operations.md": ("Operations interface", "composite_logstore.operations"),
    "api-testing.md": ("Testing interface", "composite_logstore.testing"),
}
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_OWN_HEADINGS = re.compile(r"(?:^- \[[^\]]*\]\(#[^)]*\)\n)+", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Draw blocks of Mermaid during the build, so that the browser needs no script for them."""
    fence = {"name": "mermaid", "class": "diagram", "format": draw}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, (title, package) in REFERENCES.items():
        files.append(File.generated(config, page, content=f"# {title}\n\n::: {package}\n{_behind_modules(package)}"))
    return files


def _public_names(package: str) -> list[str]:
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text()
    (names,) = re.findall(r"^__all__ = \[(.*?)\]", source, re.DOTALL | re.MULTILINE)
    return re.findall(r'"(\w+)"', names)


def _behind_modules(package: str) -> str:
    """Describe each public function that has the name of its module, behind which mkdocstrings does not find it."""
    options = "".join(
        f"      show_root_{option}\n" for option in ("heading: true", "full_path: false", "toc_entry: true")
    )
    return "".join(
        f"\n::: {package}.{name}.{name}\n    options:\n{options}"
        for name in _public_names(package)
        if (ROOT / package.replace(".", "/") / f"{name}.py").exists()
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links for the site's layout, and drop lists of the page's own headings, which the site shows itself."""
    folder = "" if page.file.src_uri in OUTSIDE.values() else "docs/"
    pieces = _FENCE.split(_OWN_HEADINGS.sub("", markdown))
    # Every second piece is a block of code.
    pieces[::2] = [_LINK.sub(lambda link: _relinked(link, folder), piece) for piece in pieces[::2]]
    return "".join(pieces)


def _relinked(link: re.Match[str], folder: str) -> str:
    text, target = link.groups()
    path, mark, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link.group()
    within = re.sub(r"^docs/\.\./", "", folder + path)
    if within in OUTSIDE:
        return f"[{text}]({OUTSIDE[within]}{mark}{anchor})"
    if within.startswith("docs/"):
        return f"[{text}]({within.removeprefix('docs/')}{mark}{anchor})"
    # The site holds no source code.
    return text


def draw(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """Return a diagram as an SVG. One that Mermaid cannot read fails the build."""
    import mermaidx
    from pymdownx.superfences import SuperFencesException

    try:
        drawn = mermaidx.render(source, theme="neutral").svg()
    except RuntimeError as error:
        # Any other exception would show the block as code.
        raise SuperFencesException(str(error)) from error
    # Its styles name its id, which has to be the only one on a page.
    name = f"diagram-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return f'<div class="{css_class}">{drawn.replace("my-svg", name)}</div>'


class _Loads(HTMLParser):
    """Collects the addresses that a page loads by itself; those of links to click are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        loading = {"src", "srcset", "data", "poster", "xlink:href"}
        if tag in ("link", "image", "use"):
            loading.add("href")
        self.addresses += [given[name] for name in loading & given.keys()]
        self.addresses += _loaded_by_css(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        self.addresses += _loaded_by_css(data)


def _loaded_by_css(text: str) -> list[str]:
    return re.findall(r"(?:url\(|@import(?!\s*url))\s*[\"']?([^\"')\s;]+)", text)


def loaded_from_elsewhere(text: str, suffix: str) -> list[str]:
    """Return the addresses on other hosts that a file of the site loads.

    Args:
        text: The file's content.
        suffix: `.html` or `.css`.
    """
    if suffix == ".css":
        addresses = _loaded_by_css(text)
    else:
        parser = _Loads()
        parser.feed(text)
        addresses = parser.addresses
    return [address for address in addresses if re.match(r"(?:[a-z]+:)?//", address, re.IGNORECASE)]


def on_post_build(config: MkDocsConfig) -> None:
    """Check the built site.

    Raises:
        PluginError: If a page loads anything from another host, since the site has to work offline; or if the API
            reference has no entry for a public name.
    """
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in loaded_from_elsewhere(path.read_text(), path.suffix):
                raise PluginError(f"{path.relative_to(site)} loads {address}")
    for page, (_, package) in REFERENCES.items():
        text = (site / page).with_suffix(".html").read_text()
        for name in _public_names(package):
            if not re.search(rf'id="{package}\.(?:{name}\.)?{name}"', text):
                raise PluginError(f"{page} has no entry for {package}.{name}")
