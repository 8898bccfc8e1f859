"""What every HTML page of the project shares: its frame, its style sheet, sections and plain tables.

Pages hold everything they need: no scripts, no requests to anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_wp.foreign import html

_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{lead}</p></header>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1f2933; --quiet: #5b6875; --line: #dfe4e9; --paper: #ffffff; --ground: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; padding: 0 clamp(14px, 4vw, 40px) 48px; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; }
header { padding: 44px 0 12px; }
h1 { margin: 0 0 10px; font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.15; letter-spacing: -.015em; }
header p { margin: 0; max-width: 72ch; color: var(--quiet); }
h2 { margin: 0 0 14px; font-size: 1.25rem; letter-spacing: -.01em; }
h3 { margin: 0 0 4px; font-size: 1rem; }
section { margin-top: 22px; padding: clamp(16px, 3vw, 28px); background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px; }
section p { margin: 0 0 12px; max-width: 78ch; color: var(--quiet); }
article + article { margin-top: 26px; padding-top: 22px; border-top: 1px solid var(--line); }
.dot { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 50%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 10px 30px; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin: 6px 0 4px; font-size: .85rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { font-size: .85rem; font-weight: 600; color: var(--quiet); }
tbody th { font-weight: 500; }
tr.merge { background: #eef5fb; }
tr.merge th { font-weight: 650; }
td small { display: inline-block; min-width: 3.6em; margin-left: .3em; font-size: .8rem; color: var(--quiet); }
table.differences thead th + th { padding-right: calc(12px + 3.1rem); }
td small.up { color: #04724d; }
td small.down { color: #b3381b; }
.note { margin: 12px 0 0; font-size: .88rem; }
pre { margin: 0 0 18px; padding: 12px 14px; overflow-x: auto; background: var(--ground);
  border: 1px solid var(--line); border-radius: 8px; font-size: .84rem; line-height: 1.5; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
p code { font-size: .9em; }
@media (max-width: 640px) {
  th, td { padding: 7px 6px; font-size: .92rem; }
  table.differences thead th + th { padding-right: 6px; }
  td small { display: block; min-width: 0; margin: 0; line-height: 1.2; }
}
footer { margin-top: 20px; font-size: .85rem; color: var(--quiet); }
"""


def frame(title: str, lead: str, body: str) -> str:
    """A whole page: `title` and `lead` are text, `body` is HTML."""
    return _FRAME.format(style=STYLE, title=html(title), lead=html(lead), body=body)


def section(title: str, body: str) -> str:
    """A section of the page: `title` is text, `body` HTML."""
    return f"<section><h2>{html(title)}</h2>\n{body}</section>"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A table of text: the first line is the head, the first cell of each other line its name."""
    head = "".join(f"<th>{html(cell)}</th>" for cell in lines[0])
    rows = "".join(
        f"<tr><th>{html(line[0])}</th>{''.join(f'<td>{html(cell)}</td>' for cell in line[1:])}</tr>"
        for line in lines[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
