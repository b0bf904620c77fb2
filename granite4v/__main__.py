"""`python -m granite4v`: the same as the `granite4v` command."""

from granite4v.cli.entry import entry

if __name__ == "__main__":
    entry()
