"""Compare greedy generation with `transformers` on the same CPU, in one process: GPT-2 124M with the same random weights in both.

    python benchmarks/generation.py                      # batches of 1 and 8, prompts of 32 tokens, 128 new ones, float32
    python benchmarks/generation.py --precision=bfloat16 --new=64

Each side runs once to compile and warm up. Then the two alternate, so that other load on the machine affects both; the figure is the minimum time.
`decode` is a second figure: new tokens a second without prefill, from the difference to a call for one token.
"""

import argparse
import json
import tempfile
import time

import jax
import numpy as np
import torch
import transformers

import jaxmodels

SIZES = {"gpt2": {}, "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpt2", help="gpt2, or tiny for a quick test of the script")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens per prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="number of PyTorch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES[options.size])).eval()
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = jaxmodels.load(f"hf:{folder}")
    reference = reference.to(getattr(torch, options.precision))
    for batch in options.batch:
        print(json.dumps(compare(model, reference, batch, options)), flush=True)


def compare(model, reference, batch: int, options) -> dict:
    """Return tokens a second of both sides, and the ratio of jaxmodels to `transformers`."""
    prompts = np.random.default_rng(0).integers(0, reference.config.vocab_size, (batch, options.prompt))

    def run_jaxmodels(new):
        completions = model.generate(prompts.tolist(), max_tokens=new, precision=options.precision)
        return np.array([completion.tokens for completion in completions])

    def run_reference(new):
        with torch.inference_mode():
            given = torch.tensor(prompts)
            mask = torch.ones_like(given)
            # Prevent an end before `new` tokens, on both sides.
            lengths = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
            tokens = reference.generate(given, attention_mask=mask, do_sample=False, **lengths)
        return tokens[:, options.prompt :].numpy()

    texts = {name: run(options.new) for name, run in (("jaxmodels", run_jaxmodels), ("reference", run_reference))}
    seconds: dict[str, dict[int, float]] = {name: {options.new: np.inf, 1: np.inf} for name in texts}
    for _ in range(options.rounds):
        for name, run in (("jaxmodels", run_jaxmodels), ("reference", run_reference)):
            for new in (options.new, 1):
                if new not in seconds[name] or seconds[name][new] == np.inf:
                    run(new)  # compile this size
                started = time.perf_counter()
                run(new)
                seconds[name][new] = min(seconds[name][new], time.perf_counter() - started)
    rates = {name: batch * options.new / times[options.new] for name, times in seconds.items()}
    decode = {name: batch * (options.new - 1) / (times[options.new] - times[1]) for name, times in seconds.items()}
    return {
        "model": options.size,
        "precision": options.precision,
        "batch": batch,
        "prompt": options.prompt,
        "new": options.new,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "decode_tokens_per_second": {name: round(rate, 1) for name, rate in decode.items()},
        "ratio": round(rates["jaxmodels"] / rates["reference"], 3),
        "decode_ratio": round(decode["jaxmodels"] / decode["reference"], 3),
        "first_token_ms": {name: round(1e3 * times[1], 1) for name, times in seconds.items()},
        "same_tokens": round(float(np.mean(texts["jaxmodels"] == texts["reference"])), 4),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "torch_threads": options.threads},
    }


if __name__ == "__main__":
    main()
