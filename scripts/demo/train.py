r"""Train the demo model from scratch on generated text.

    python -m scripts.demo.train --tokenizer moecli/demo/model --out build/demo --compile \
        --steps 11000 --minutes 3.8 --report 250 --probe 300

This made the shipped weights. They live in bfloat16 from the start; the optimizer keeps
float32 masters. A load-balance loss per layer keeps every expert in use and leaves room for experts
to specialise.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from scripts.demo.corpus import END, mixed_scenes, stream
from scripts.demo.dropping import drop_experts
from scripts.demo.scenes import Scene, segments
from scripts.demo.scoring import accuracies, heldout_losses

ROW_TOKENS = 512
STEPS_PER_CHUNK = 8
BALANCE = 0.01
ANSWER = 1 << 15
"""This bit marks the tokens of an answer in a packed row."""
PASSAGE_WEIGHT = 0.25


def model_config(vocabulary: int) -> Qwen3MoeConfig:
    """Four layers of sixteen small experts, four at work per token."""
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=ROW_TOKENS,
        tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )


class Rows:
    """Packs whole documents into rows of tokens; one chunk is a seeded array of rows."""

    def __init__(self, tokenizer_file: str, rows_per_chunk: int) -> None:
        """Remember what a worker process needs; the tokenizer is opened there."""
        self.tokenizer_file, self.rows_per_chunk = tokenizer_file, rows_per_chunk

    def __call__(self, chunk: int) -> np.ndarray:
        """The rows of one chunk, [rows, ROW_TOKENS]."""
        rng = stream("training", str(chunk))
        tokenizer = Tokenizer.from_file(self.tokenizer_file)
        encoded = self._encoded(tokenizer, mixed_scenes(rng))
        rows = np.zeros((self.rows_per_chunk, ROW_TOKENS), dtype=np.uint16)
        for row in rows:
            # Half of the rows open without the separator, as a prompt does in an evaluation.
            filled = rng.randrange(2)
            while filled < ROW_TOKENS:
                ids = next(encoded)[: ROW_TOKENS - filled]
                row[filled : filled + len(ids)] = ids
                filled += len(ids)
        return rows

    @staticmethod
    def _encoded(tokenizer: Tokenizer, scenes: Iterator[Scene]) -> Iterator[list[int]]:
        while True:
            batch = [[*segments(scene), (END, False)] for scene in islice(scenes, 128)]
            texts = [text for pieces in batch for text, _ in pieces]
            encodings = iter(tokenizer.encode_batch(texts))
            for pieces in batch:
                yield [token | ANSWER if answer else token for _, answer in pieces for token in next(encodings).ids]


class Optimizer:
    """AdamW on float32 masters of bfloat16 weights."""

    def __init__(self, model: torch.nn.Module, decay: float = 0.1) -> None:
        """Copy the weights; decay matrices only."""
        self.weights = list(model.parameters())
        self.masters = [w.detach().float().clone() for w in self.weights]
        groups = [
            {"params": [m for m in self.masters if m.ndim > 1], "weight_decay": decay},
            {"params": [m for m in self.masters if m.ndim == 1], "weight_decay": 0.0},
        ]
        fused = self.masters[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=fused)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One clipped update; the weights become their rounded masters."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        torch._foreach_copy_(self.weights, self.masters)


def balance_loss(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Mean over layers of E * sum_e(share of choices * mean probability); 1 when balanced."""
    losses = []
    for logits_TE in router_logits:
        prob_TE = logits_TE.float().softmax(-1)
        chosen_Tk = prob_TE.topk(top_k, dim=-1).indices
        count_E = torch.zeros_like(prob_TE[0]).scatter_add_(
            0, chosen_Tk.flatten(), torch.ones_like(chosen_Tk.flatten(), dtype=torch.float)
        )
        losses.append(prob_TE.shape[1] * (count_E / chosen_Tk.numel() * prob_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def losses(model: torch.nn.Module, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Next-token loss, answers weighing most, and balance loss of one batch."""
    ids = rows & (ANSWER - 1)
    out = model(input_ids=ids, output_router_logits=True, use_cache=False)
    logits = out.logits[:, :-1].flatten(0, 1).float()
    each = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    weight = torch.where(rows[:, 1:] >= ANSWER, 1.0, PASSAGE_WEIGHT).flatten()
    return (each * weight).sum() / weight.sum(), balance_loss(out.router_logits, top_k)


def learning_rate(progress: float, step: int, peak: float, warmup: int = 200) -> float:
    """A short ramp, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def fit(model: torch.nn.Module, tokenizer_file: str, options: argparse.Namespace, pool) -> dict:
    """Train until the steps or the minutes are used up; the cosine follows whichever is nearer."""
    device = next(model.parameters()).device
    tokenizer = Tokenizer.from_file(tokenizer_file)
    chunks = math.ceil(options.steps / STEPS_PER_CHUNK)
    make = Rows(tokenizer_file, options.batch * STEPS_PER_CHUNK)
    measure = torch.compile(losses) if options.compile else losses
    optimizer, started, step = Optimizer(model), time.monotonic(), 0
    for rows in pool.imap(make, range(chunks)):
        for batch in torch.from_numpy(rows.astype(np.int64)).to(device).split(options.batch):
            # The clock starts after the first step, which may have waited for the compiler.
            started = time.monotonic() if step < 2 else started
            elapsed_s = time.monotonic() - started
            progress = max(step / options.steps, elapsed_s / (60 * options.minutes))
            text, balance = measure(model, batch, model.config.num_experts_per_tok)
            (text + BALANCE * balance).backward()
            optimizer.step(learning_rate(progress, step, options.rate))
            if step % options.report == 0:
                print(f"step {step} {elapsed_s:.0f}s loss {text:.4f} balance {balance:.3f}")
            if step and step % (options.report * 10) == 0:
                show(accuracies(model, tokenizer, 100))
            step += 1
        if progress >= 1:
            break
    tokens = step * options.batch * ROW_TOKENS
    return {"steps": step, "tokens": tokens, "seconds": round(time.monotonic() - started)}


def show(table: dict[str, dict[str, float]]) -> None:
    """Print each domain's mean accuracy on one line."""
    print("  " + "  ".join(f"{domain} {kinds['all']:.3f}" for domain, kinds in table.items()))


def summary(model: torch.nn.Module, tokenizer: Tokenizer, count: int) -> dict:
    """Held-out loss, accuracy by kind, and accuracy with a random half of the experts."""
    facts = {"loss": heldout_losses(model, tokenizer)}
    facts["accuracy"] = accuracies(model, tokenizer, count)
    show(facts["accuracy"])
    for seed in range(3):
        half = deepcopy(model)
        drop_experts(half, keep=model.config.num_experts // 2, seed=seed)
        facts[f"accuracy, half dropped, seed {seed}"] = accuracies(half, tokenizer, count)
        show(facts[f"accuracy, half dropped, seed {seed}"])
    return facts


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=9.0, help="end here at the latest")
    parser.add_argument("--batch", type=int, default=64, help=f"rows of {ROW_TOKENS} tokens")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--probe", type=int, default=1000, help="final questions per domain")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def main() -> None:
    """Train, save, measure."""
    options = parse()
    tokenizer_file = str(options.tokenizer / "tokenizer.json")
    tokenizer = Tokenizer.from_file(tokenizer_file)
    with multiprocessing.get_context("fork").Pool(options.workers) as pool:
        torch.manual_seed(0)
        config = model_config(tokenizer.get_vocab_size())
        # `from_config` leaves the rotary frequencies in float32, as loading does; a cast would not.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(options.device)
        model.set_experts_implementation("grouped_mm")
        facts = fit(model, tokenizer_file, options, pool)
    model.eval().save_pretrained(options.out)
    facts["parameters"] = sum(weight.numel() for weight in model.parameters())
    print(facts)
    facts |= summary(model, tokenizer, options.probe)
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
