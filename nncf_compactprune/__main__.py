"""``python -m nncf_compactprune``: the same as the command."""

from nncf_compactprune.cli import main

if __name__ == "__main__":
    main()
