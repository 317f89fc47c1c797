"""``lora-tree help``: a command's options, or a topic that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import SpecError, suggest
from ..console import out
from ..help_topics import TOPICS

__all__ = ["explain"]


def explain(
    topic: Annotated[
        str | None, typer.Argument(help="A topic or a command.", metavar="TOPIC")
    ] = None,
) -> None:
    """Explain a topic, like paths or data, or a command; list the topics without one."""
    from ..application import COMMANDS, application  # `application` imports this module in turn

    if topic is None:
        for name, (about, _) in TOPICS.items():
            out().print(f"lora-tree help {name:10} {about}")
    elif topic in TOPICS:
        out().print(TOPICS[topic][1].rstrip(), soft_wrap=True)
    elif topic in COMMANDS:
        application([topic])([topic, "--help"], prog_name="lora-tree")
    else:
        known = [*TOPICS, *COMMANDS]
        raise SpecError(
            f"no help on {topic!r}{suggest(topic, known)}", "lora-tree help lists the topics"
        )
