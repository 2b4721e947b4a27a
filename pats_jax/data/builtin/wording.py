"""Spelling: capitals, full stops, the article before a vowel."""

import re

# "a" before a vowel that is spoken as one; "a used car" and "a one" keep it.
_A_BEFORE_VOWEL = re.compile(r"\b([Aa])(?= (?!use|uni|one\b|eu)[aeiou])")


def with_articles(text: str) -> str:
    """Returns the text with "a" turned into "an" where the next word begins with a vowel."""
    return _A_BEFORE_VOWEL.sub(r"\1n", text)


def sentence(text: str, end: str = ".") -> str:
    """Returns the text as a sentence: articles mended, a capital first, a full stop (or another mark) last."""
    text = with_articles(text)
    return f"{text[0].upper()}{text[1:]}{end}"
