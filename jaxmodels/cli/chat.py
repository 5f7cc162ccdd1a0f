"""jaxmodels chat."""

from jaxmodels.cli.arguments import add_command, add_run, configure
from jaxmodels.cli.serve import add_running, running


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "chat", run_chat, "talk to a run in the terminal: /reset begins anew, /exit ends, Ctrl-C stops an answer")
    add_run(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message, before the conversation")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="new tokens of an answer (default: what the context leaves)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature; 0 is greedy decoding (default: 1)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="sample from the smallest set of tokens with total probability P")
    parser.add_argument("--top_k", type=int, default=0, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed of sampling (default: another each time)")
    add_running(parser)


def run_chat(options, overrides):
    """Talk until the input ends."""
    import sys

    how = running(options, overrides)
    configure(options)
    from jaxmodels.serving.terminal import talk
    from jaxmodels.training.compile import use_persistent_cache

    if problem := use_persistent_cache():
        print(f"jaxmodels: {problem}", file=sys.stderr)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")}
    talk(options.workdir, how, system=options.system, max_tokens=options.max_tokens, sampling=sampling)
