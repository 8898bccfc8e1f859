"""Help with options under headings, the way mergekit's commands group theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click


class GroupedCommand(click.Command):
    """A click command whose `groups` map a heading to parameter names; the rest comes under Miscellaneous."""

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        heading = {name: title for title, names in self.groups.items() for name in names}
        for title in [*self.groups, "Miscellaneous"]:
            chosen = [
                p
                for p in self.get_params(ctx)
                if isinstance(p, click.Option) and heading.get(p.name or "", "Miscellaneous") == title
            ]
            if records := [record for p in chosen if (record := p.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)
