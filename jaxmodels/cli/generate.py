"""jaxmodels generate."""

import json
import sys

from jaxmodels.cli.arguments import add_command, add_run, configure

_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "beams", "length_penalty", "seed", "precision")


def add(commands) -> None:
    """Add the command."""
    summary = "generate text with a run: a continuation of the prompt, or the output of a seq2seq run"
    parser = add_command(commands, "generate", run_generate, summary)
    add_run(parser)
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be repeated: one completion for each prompt")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="maximum number of new tokens (default: 128, or what the model's context leaves)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature; 0, the default, is greedy decoding")
    parser.add_argument("--top_k", type=int, metavar="K", help="sample from the K most likely tokens")
    parser.add_argument("--top_p", type=float, metavar="P", help="sample from the smallest set of tokens with total probability P")
    parser.add_argument("--min_p", type=float, metavar="P", help="sample from tokens with at least P times the highest probability")
    parser.add_argument("--repetition_penalty", type=float, metavar="R", help="values above 1 make tokens of the prompt and the text less likely")
    parser.add_argument("--beams", type=int, default=1, metavar="K", help="beam search with K beams (default: 1, none)")
    parser.add_argument(
        "--length_penalty", type=float, default=1.0, metavar="A", help="beam search: exponent of the length; larger favours longer texts (default: 1)"
    )
    early = "beam search: true ends with K complete texts; never, only when no better one is possible; false estimates that (default: false)"
    parser.add_argument("--early_stopping", choices=("true", "false", "never"), default="false", help=early)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the text before this string; may be repeated")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of sampling (default: 0)")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16", "int8"), default="float32", help="of the computation; int8: of the weights (default: float32)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the text of the one prompt as it is generated")
    output.add_argument("--json", action="store_true", help="print one JSON object")


def run_generate(options, _):
    """Generate, and print the texts."""
    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.inference import load
    from jaxmodels.training.signals import StopSignals

    if options.stream and len(options.prompt) > 1:
        raise ConfigError(f"--stream prints the text of one prompt, got {len(options.prompt)}: give one --prompt, or leave out --stream.")
    chosen = {name: getattr(options, name) for name in _OPTIONS}
    chosen |= {"stop": options.stop, "early_stopping": {"true": True, "false": False}.get(options.early_stopping, options.early_stopping)}
    configure(options)
    try:
        with StopSignals() as stop, stop.may_raise():
            import jax

            from jaxmodels.training.compile import use_persistent_cache

            if problem := use_persistent_cache():
                print(f"jaxmodels: {problem}", file=sys.stderr)
            run = load.load(options.workdir, spread=jax.device_count() > 1)
            continues = run.config["task"]["name"] == "language_model"
            if options.stream:
                _print_stream(options.prompt[0] if continues else "", run.stream(options.prompt[0], **chosen))
                return
            completions = run.generate(options.prompt, **chosen)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped; there is nothing to save.") from None
    if options.json:
        shown = [{"prompt": c.prompt, "text": c.text, "tokens": c.tokens, "finish": c.finish, "score": c.score} for c in completions]
        print(json.dumps({"run": options.workdir, "step": run.step, "completions": shown}))
        return
    for completion in completions:
        print((completion.prompt if continues else "") + completion.text)


def _print_stream(before: str, pieces) -> None:
    pieces = iter(pieces)
    print(before, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
