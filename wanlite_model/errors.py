"""The one error type a user can meet."""

LONGEST = 800           # characters of a line; it may quote what a stranger wrote
MOST_LINES = 40


class WanLiteError(ValueError):
    """What was found, what was expected, and what to do next, as sentences a user reads in the graph.

    `expected` and `fix` may be empty where `found` already says everything.
    """

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = (_shown(part.strip()) for part in (found, expected, fix))
        super().__init__(" ".join(part for part in (self.found, self.expected, self.fix) if part))


def _shown(part: str) -> str:
    """In characters that can be written anywhere, each line without the middle of what is too long to be read."""
    lines = part.split("\n")[:MOST_LINES]
    lines = [line if len(line) <= LONGEST else f"{line[:LONGEST // 2]} … {line[-LONGEST // 4:]}" for line in lines]
    return "\n".join("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line) for line in lines)
