"""The command `runner`, also as `python -m runner`."""

import signal
import sys


def main() -> int:
    """Runs the command line; ctrl-C before that is ready ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from runner import cli

    try:
        return cli.main()
    except KeyboardInterrupt:  # a second one, while the first is being answered
        return 75
    finally:  # what is done is done: nothing shall make another exit code of it
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
