"""A tool that tells weekdays, which models often get wrong.

A document uses it by ``tools: [calendar]``, or ``tools: [{name: calendar, short: true}]``.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from flowmesh_agent.tools import Tool, ToolContext, ToolError
from pydantic import BaseModel, ConfigDict, Field


class CalendarOptions(BaseModel):
    """What a document may say beside the name; anything else is an error before the agent runs."""

    model_config = ConfigDict(extra="forbid")

    short: bool = False


class CalendarArguments(BaseModel):
    """What the model gives; it is told the descriptions."""

    date: str = Field(description="a day, as in 2024-02-29")
    days_later: int = Field(default=0, description="how many days to add first; may be negative")


class CalendarTool(Tool[CalendarArguments]):
    """Tells the weekday of a date, or of one some days later."""

    name = "calendar"
    description = "Tell the weekday of a date, or the date and weekday some days later."
    parameters = CalendarArguments

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = CalendarOptions.model_validate(options)

    async def call(self, ctx: ToolContext, arguments: CalendarArguments) -> dict[str, str]:
        """Return ``date`` and ``weekday``."""
        try:
            start = datetime.date.fromisoformat(arguments.date)
            day = start + datetime.timedelta(days=arguments.days_later)
        except (ValueError, OverflowError) as exc:  # the model reads this, and may try again
            raise ToolError(f"{arguments.date!r} is no date: {exc}") from exc
        return {
            "date": day.isoformat(),
            "weekday": day.strftime("%a" if self._options.short else "%A"),
        }
