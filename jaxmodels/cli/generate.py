"""jaxmodels generate."""

import argparse
import json
import sys

from jaxmodels.cli.arguments import configure


def add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", required=True, metavar="RUN[@best|@latest|@STEP]", help="the run; the best checkpoint where one is kept, else the latest")
    sub.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="given several times, a text is made of each")
    sub.add_argument("--max_tokens", type=int, metavar="N", help="new tokens at most (default: 128, or as many as the model's context leaves)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="the logits are divided by; 0, the default, takes the likeliest token")
    sub.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens")
    sub.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest tokens that have this probability together")
    sub.add_argument("--min_p", type=float, metavar="P", help="draw from tokens that have this share of the likeliest one's probability")
    sub.add_argument("--repetition_penalty", type=float, metavar="R", help="above 1, tokens that are there already become less likely")
    sub.add_argument("--beams", type=int, default=1, metavar="K", help="search for the likeliest text, following K at a time")
    sub.add_argument("--length_penalty", type=float, default=1.0, metavar="A", help="of beams: above 0, longer texts gain (default: 1)")
    sub.add_argument(
        "--early_stopping", choices=("true", "false", "never"), default="false", help="of beams: end with K complete texts; or only when none can be better"
    )
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a string that ends a text; may be given several times")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing (default: 0)")
    sub.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--stream", action="store_true", help="print the text of one prompt as it comes")
    shown.add_argument("--json", action="store_true", help="print one JSON object")


def run_generate(options, _):
    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.inference import load
    from jaxmodels.training.signals import StopSignals

    if options.stream and len(options.prompt) > 1:
        raise ConfigError("--stream shows one text as it comes: give one --prompt, or leave out --stream.")
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "beams", "length_penalty", "seed", "precision")
    chosen = {name: getattr(options, name) for name in names}
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
