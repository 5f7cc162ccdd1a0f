"""jaxmodels checkpoint: verify the checkpoints of a run."""

from jaxmodels.cli.arguments import add_command, configure


def add(commands) -> None:
    """Add the command."""
    text = "verify reads every array of a run's checkpoints and compares it with its checksum; exit status 1 if one differs or cannot be read"
    parser = add_command(commands, "checkpoint", run, "verify the checkpoints of a run")
    parser.add_argument("action", choices=("verify",), help=text)
    parser.add_argument("run", metavar="RUN[@best|@latest|@STEP]", help="run folder (default: all its checkpoints)")


def run(options, _) -> int:
    """Print one line for each checkpoint, and one for each damaged array."""
    configure(options)
    from jaxmodels.runs.disk import in_words
    from jaxmodels.runs.verify import verify

    damaged = False
    for verdict in verify(options.run):
        damaged = damaged or bool(verdict.problems)
        size = f"{verdict.arrays} arrays, {in_words(verdict.bytes)}"
        if verdict.problems:
            print(f"step {verdict.step}: damaged", *verdict.problems, sep="\n  ", flush=True)
        elif verdict.has_checksums:
            print(f"step {verdict.step}: whole ({size})", flush=True)
        else:
            print(f"step {verdict.step}: can be read, but was saved without checksums ({size})", flush=True)
    return int(damaged)
