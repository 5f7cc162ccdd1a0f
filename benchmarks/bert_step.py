"""Compare one fine-tuning step of BERT-base in `jaxmodels` and in `transformers` on PyTorch, with the same sizes on the same CPU.

    python benchmarks/bert_step.py
    python benchmarks/bert_step.py --parts          # and the parts of the jaxmodels step

A step is forward, backward and AdamW on a batch of 16 labelled sequences of 128 tokens, in float32, with random weights and the published dropout. The
two sides alternate in one process for ROUNDS rounds, after one uncounted step each. A figure is the median over the rounds; a ratio is the median of the
rounds' ratios. PyTorch runs eagerly, with the attention that `transformers` selects and the fused AdamW of its trainer.

`transformers` also has attention dropout (`attention_probs_dropout_prob`), which jaxmodels does not have. It is measured with and without.
"""

import argparse
import statistics
import time

import numpy as np

SIZES = {"layers": 12, "heads": 12, "width": 768, "mlp_width": 3072, "vocab": 30522}
CONFIG = {
    "model": {"name": "bert-base"},
    "task": {"name": "classify_text"},
    "data": {"source": "arrays"},
    "optimizer": {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.01},
    "training": {"steps": 1000},
}


def batch(rows: int, length: int) -> dict[str, np.ndarray]:
    """Return a batch of tokens without padding, and labels."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, SIZES["vocab"], (rows, length), np.int32)
    tokens[0, 0] = SIZES["vocab"] - 1  # sets the vocabulary size, which follows from the largest token
    return {"tokens": tokens, "label": (np.arange(rows) % 2).astype(np.int32)}


class JaxStep:
    """The compiled train step of a jaxmodels config."""

    def __init__(self, name: str, data: dict, changes: dict):
        from run_step import run_step

        from jaxmodels.config import set_at
        from jaxmodels.experiment.build import build_experiment
        from jaxmodels.parallel import mesh as mesh_lib

        config = {section: dict(values) for section, values in CONFIG.items()}
        config["data"]["batch_size"] = len(data["label"])
        for key, value in changes.items():
            set_at(config, key, value)
        self.name = name
        experiment = build_experiment(config, data={"train": data})
        self.compiled, self.state, self.key, mesh = run_step(experiment)
        batch = {**data, "weight": np.ones(len(data["label"]), np.float32)}
        self.batch = mesh_lib.place(batch, mesh_lib.batch_sharding(mesh), len(data["label"]))

    def step(self) -> float:
        """Run one step and return the loss."""
        self.state, metrics = self.compiled(self.state, self.batch, self.key)
        total, weight = metrics["loss"]
        return float(total) / float(weight)


class TorchStep:
    """The step of a usual PyTorch training loop."""

    def __init__(self, name: str, data: dict, **options):
        import torch
        import transformers

        self.name = name
        config = transformers.BertConfig(num_labels=2, **options)
        self.model = transformers.BertForSequenceClassification(config).train()
        decayed = [p for n, p in self.model.named_parameters() if not n.endswith("bias") and "LayerNorm" not in n]
        others = [p for n, p in self.model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-5, fused=True)
        tokens = torch.from_numpy(data["tokens"].astype(np.int64))
        self.batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.from_numpy(data["label"].astype(np.int64))}

    def step(self) -> float:
        """Run one step and return the loss."""
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def alternate(sides: list, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds, processor seconds) of each side's step by round. Other work on the machine affects the second less."""
    for side in sides:
        loss = side.step()
        assert np.isfinite(loss) and loss < 3, (side.name, loss)
    times = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            time.sleep(0.2)  # until the other side's threads stop spinning
            started, busy = time.perf_counter(), time.process_time()
            side.step()
            times[side.name].append((time.perf_counter() - started, time.process_time() - busy))
    return times


def main():
    """Print seconds a step and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--parts", action="store_true", help="also measure the jaxmodels step without dropout, with the approximate GELU, and with plain SGD")
    options = parser.parse_args()
    import torch

    from jaxmodels.hardware.malloc import tune_malloc

    tune_malloc()
    data = batch(options.rows, options.length)
    sides = [
        JaxStep("jaxmodels", data, {}),
        TorchStep("transformers", data),
        TorchStep("transformers, no attention dropout", data, attention_probs_dropout_prob=0.0),
    ]
    if options.parts:
        sides += [
            JaxStep("jaxmodels, no dropout", data, {"model.dropout": 0.0}),
            JaxStep("jaxmodels, no dropout, GELU by tanh", data, {"model.dropout": 0.0, "model.activation": "gelu"}),
            JaxStep(
                "jaxmodels, no dropout, GELU by tanh, SGD",
                data,
                {"model.dropout": 0.0, "model.activation": "gelu", "optimizer": {"name": "sgd", "learning_rate": 1e-3}},
            ),
            TorchStep("transformers, no dropout", data, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
        ]
    times = alternate(sides, options.rounds)
    print(f"one step of BERT-base, {options.rows} x {options.length}, {options.rounds} rounds, {torch.get_num_threads()} threads")
    for name, values in times.items():
        for unit, column in (("seconds", 0), ("processor seconds", 1)):
            own = [value[column] for value in values]
            ratio = statistics.median(a / b[column] for a, b in zip(own, times["jaxmodels"], strict=True))
            print(f"  {name:<41} {unit:<18} median {statistics.median(own):6.2f}  min {min(own):6.2f}  max {max(own):6.2f}   {ratio:5.2f} x jaxmodels")


if __name__ == "__main__":
    main()
