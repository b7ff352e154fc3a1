"""UserError, the exception for all mistakes of the user."""

MOST_CHARS = 800  # limit for a message


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, what to do. Scripts exit with code 2."""


def few(names) -> str:
    """Returns the first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def one_line(message) -> str:
    """Returns a message without line breaks; cuts the middle out of a long one, which may quote a file."""
    line = " ".join(str(message).split())
    return line if len(line) <= MOST_CHARS else f"{line[: MOST_CHARS // 2]} ... {line[-MOST_CHARS // 2 :]}"
