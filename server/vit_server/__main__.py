"""The command `vit-server`, also available as `python -m vit_server`."""

import signal


def main() -> None:
    """Run the command."""
    # The imports take half a second; Ctrl-C during them must not print a stack trace.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from . import cli

    cli.main()


if __name__ == "__main__":
    main()
