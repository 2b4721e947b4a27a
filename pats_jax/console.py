"""Lines for people: what programs say on a console."""

import rich.console


def say(console: rich.console.Console, text: str) -> None:
    """Prints text as it is, without markup and line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
