"""Pages: jinja2 templates in `templates/`, with everything in the page itself: no requests to anywhere, and no scripts
but `page.js`, in pages that ask for it. A page's own policy says so to the browser, whatever text it holds.

What a template is given is text, brought on one line and escaped; only `Markup` goes in as it is, and only templates,
`grid`, `section`, `bullets`, `figure` and pictures make it. Text of several lines goes through the filter `lines`.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from mergekit_wp.console import percent
from mergekit_wp.foreign import one_line, one_line_each
from mergekit_wp.palette import themed, variables


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mergekit_wp"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else one_line(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["lines"] = lambda text: escape(one_line_each(str(text)))
    environment.globals |= {"figure": figure, "bullets": bullets}
    return environment


def render(template: str, **values: Any) -> Markup:
    """A template of `templates/` as HTML."""
    return Markup(_environment().get_template(template).render(**values))


def render_text(template: str, **values: Any) -> Markup:
    """The same of a template that is given as text."""
    return Markup(_compiled(template).render(**values))


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def frame(title: str, lead: str, body: Markup, foot: str = "", data: Mapping[str, Any] | None = None) -> str:
    """A whole page, its pictures in the reader's colours. data: what `page.js` reads, which comes with it."""
    script = None if data is None else Markup(_source("page.js"))
    return str(render(
        "page.html", title=title, lead=lead, body=Markup(themed(body)), foot=foot, variables=Markup(variables()),
        script=script, data=None if data is None else htmlsafe_json_dumps(data), policy=_policy(script),
    ))  # fmt: skip


def _source(name: str) -> str:
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


def _policy(script: str | None) -> str:
    """https://www.w3.org/TR/CSP3: nothing is fetched, and no script runs but ours."""
    runs = "" if script is None else f" script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}';"
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:;{runs} base-uri 'none'; form-action 'none'"


def bullets(texts: Sequence[str], head: str = "") -> Markup:
    """A list of sentences below its head; nothing for none."""
    return render("bullets.html", texts=texts, head=head) if texts else Markup("")


def figure(caption: str, picture: Markup, name: str = "", task: str = "", scores: str = "") -> Markup:
    """A picture with its caption. name: what links to it say; task, scores: of which alone it is."""
    return render("figure.html", caption=caption, picture=picture, name=name, task=task, scores=scores)


def section(title: str, body: Markup, name: str = "") -> Markup:
    """A part of a page; `name`: what links to it say."""
    return render_text(
        '<section{% if name %} id="{{ name }}"{% endif %}><h2>{{ title }}</h2>\n{{ body }}</section>\n',
        title=title, body=body, name=name,
    )  # fmt: skip


def grid(lines: Sequence[Sequence[str]]) -> Markup:
    """A table of text: the first line is the head, the first cell of each other line its name."""
    return render("grid.html", grid=lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The same for a terminal: its first column on the left, the others on the right, a rule below the head."""
    cells = [[one_line(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    texts = (
        [line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))] for line in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in texts)


def markdown_grid(lines: Sequence[Sequence[str]], align: str = "") -> str:
    """The same as a GitHub table, of cells that are Markdown already; `align`: `l` or `r` for each column."""
    align = align or "l" + "r" * (len(lines[0]) - 1)
    rule = "|" + "".join("---:|" if side == "r" else "---|" for side in align)
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, rule, *rows])
