"""Errors a user can cause: raised as `UserError`, shown as one line, exit code 2."""

import functools
import os
import sys


class UserError(ValueError):
    """Wrong input: the message names the argument or file and the mend."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its type: what a `UserError` quotes of another library's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # torch: "Error(s) in loading state_dict for X:" and then what is wrong
        return lines[1]
    return lines[0] if lines else type(error).__name__


def exit_2_on_user_error(main):
    """Decorate an entry's `main()`: a `UserError` becomes one line on stderr and exit code 2, Ctrl-C one line and 130, a closed pipe (`| head`) nothing."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.stdout.flush()
            os._exit(130)  # not sys.exit: worker processes were interrupted too, and waiting for them prints their tracebacks
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE, as the shell would say

    return wrapped
