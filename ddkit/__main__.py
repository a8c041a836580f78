"""`python -m ddkit` is the command `ddkit`."""

from ddkit.cli import main

if __name__ == "__main__":
    main(prog_name="ddkit")
