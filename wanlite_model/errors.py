"""The one error type a user can meet."""


class WanLiteError(ValueError):
    """What was found, what was expected, and what to do next, as sentences a user reads in the graph.

    `expected` and `fix` may be empty where `found` already says everything.
    """

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(" ".join(part.strip() for part in (found, expected, fix) if part.strip()))
