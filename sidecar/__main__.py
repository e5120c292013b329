"""`python -m sidecar` is the `killswitch` command, for where its script is not on the path."""

from sidecar.cli.main import main

if __name__ == "__main__":
    main()
