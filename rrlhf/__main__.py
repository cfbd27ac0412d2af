"""`python -m rrlhf` is the `rrlhf` command."""


def main() -> None:
    """Run the command. Its modules are imported here, where Ctrl-C ends even that without a trace."""
    try:
        from rrlhf.cli import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
