"""UserError, the exception for all mistakes of the user."""

import errno

MOST_CHARS = 800  # limit for a message
# advice for the OSErrors that a user can fix; any other OSError keeps its traceback
ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some disk space and try again")
ADVICE[errno.ENAMETOOLONG] = "choose a shorter name"
ADVICE |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "a file or folder is in the way: choose another")
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place where you may read and write")


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
