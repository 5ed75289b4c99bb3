"""The words that a text is split into before each becomes tokens, and where they are certain."""

from __future__ import annotations

import re

import tokenizers as hf
from tokenizers import pre_tokenizers

# Letters, digits, punctuation, whitespace; a single leading space belongs to its word. Every
# alternative is bounded, which is what bounds the text that a stream must hold back.
_SOLID = r" ?[\p{L}\p{M}]{1,32}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,8}"
_BLANK = r"\s{1,32}(?!\S)|\s{1,32}"
WORD = f"{_SOLID}|{_BLANK}"
# The same, faster: what looks no further is one automaton.
GROUPED = f"(?:{_SOLID})|{_BLANK}"
# The longest look of any alternative: a space and 32 letters, or 32 spaces and what follows them.
WINDOW = 33
# A word starts before whitespace that follows anything else, wherever the scan began: no
# alternative takes whitespace after its first character, and none that ends here looks further.
# Python's \s is the scan's \s and \x1c to \x1f.
_SPACE = re.compile(r".*\S(?=[ \t\r\n])", re.DOTALL)
_WHITESPACE = re.compile(r"[^\S\x1c-\x1f]+")  # the scan's \s+
_ROOM = (32, 3, 8)  # letters, digits, punctuation
_NEAR = 256  # characters before a part's end in which one is looked for, before it is scanned whole

# Characters tokenized at a time: bounds the memory of Python's numbers, one a token, and how long
# other threads wait while they are made.
_PART = 64 * 1024

SCAN = pre_tokenizers.Split(hf.Regex(WORD), behavior="isolated")


def split(text: str) -> tuple[list[str], str]:
    """Cuts text, which begins with a word, into parts of whole words and the rest that may change.

    Each part alone has the words that it has in the text. The rest is shorter than WINDOW.
    """
    parts = []
    start = 0
    while end := _cut(text, start, min(start + _PART, len(text))):
        parts.append(text[start:end])
        start = end
    return parts, text[start:]


def _cut(text: str, start: int, stop: int) -> int:
    """The end in (start, stop] of a part that begins at start, or 0 if none is certain yet."""
    near = max(start, stop - _NEAR)
    if space := _SPACE.match(text, near, stop):
        return space.end()
    if near > start and (end := _scan(text, near, stop, begins_word=False)):
        return end
    return _scan(text, start, stop, begins_word=True)


def _scan(text: str, start: int, stop: int, *, begins_word: bool) -> int:
    """The last certain end of a part in (start, stop], or 0, by a scan for words from start."""
    final = stop - start - WINDOW
    words = SCAN.pre_tokenize_str(text[start:stop]) if final >= 0 else []
    if not begins_word:
        solid = (i for i, (word, _) in enumerate(words, start=1) if _ends_anyway(word))
        words = words[next(solid, len(words)) :]
    for word, (begin, end) in reversed(words):
        if begin <= final:
            # "\n\na" is "\n", "\n", "a", but "\n\n" is one word: whitespace ends no part, except
            # as its only word.
            return start + (begin if begin and _WHITESPACE.fullmatch(word) else end)
    return 0


def _ends_anyway(word: str) -> bool:
    """Whether a word is one's end wherever that began: its kind of character ended, not its room.

    No word goes on from anything but whitespace to another kind.
    """
    return not _WHITESPACE.fullmatch(word) and len(word.removeprefix(" ")) not in _ROOM
