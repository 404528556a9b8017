"""The sister commands of the command line, one file each. `add` gives a parser its arguments; all else is imported when
the command runs, so that `--help` answers at once."""
