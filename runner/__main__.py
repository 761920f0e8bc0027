"""The command `runner`, also as `python -m runner`."""

import _signal  # not `signal`, whose own import takes long enough for a ctrl-C to fall into it
import os
import sys


def main() -> int:
    """Runs the command line; ctrl-C before that is ready ends the process without a word."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    from runner import cli

    try:
        code = cli.main()
        if cli.is_brief:  # a tenth of such a command would be taking the interpreter apart
            os._exit(code)
        return code
    except KeyboardInterrupt:  # a second one, while the first is being answered
        return 75
    finally:  # what is done is done: nothing shall make another exit code of it
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(_signal, name):
                _signal.signal(getattr(_signal, name), _signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
