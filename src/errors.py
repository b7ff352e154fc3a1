"""The one exception for mistakes of the user's."""


class UserError(Exception):
    """A mistake of the user's, told in one line: what, where, what to do.  Scripts exit with code 2."""


def one_line(message) -> str:
    return " ".join(str(message).split())
