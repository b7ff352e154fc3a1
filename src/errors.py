"""The one exception for mistakes of the user's."""

MOST_CHARS = 800  # of a message


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, what to do.  Scripts exit with code 2."""


def few(names) -> str:
    """The first three of some names, and how many there are besides."""
    names = list(names)
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def one_line(message) -> str:
    """A message without line breaks; what a file holds may be long, and is cut."""
    line = " ".join(str(message).split())
    return line if len(line) <= MOST_CHARS else f"{line[: MOST_CHARS // 2]} ... {line[-MOST_CHARS // 2 :]}"
