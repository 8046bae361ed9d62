"""A golden pair: `NAME.yaml`, a broken recipe, and `NAME.txt`, the whole answer of `moecli check` to it.

A first line `# args: ...` adds to the command line. The last line of the answer is the exit code. Recipes name
the model `tiny`: one MoE layer, 16 experts, top-2, D = 256, F = 128, all zeros, made beside them.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from moecli.cli.main import run

HERE = Path(__file__).parent
EXPERTS, HIDDEN, WIDTH, VOCAB, HEAD_DIM = 16, 256, 128, 64, 64

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 1,
    "hidden_size": HIDDEN, "intermediate_size": WIDTH, "moe_intermediate_size": WIDTH, "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": HEAD_DIM,
    "vocab_size": VOCAB, "max_position_embeddings": 512, "norm_topk_prob": True, "tie_word_embeddings": False,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16",
}  # fmt: skip


def names() -> list[str]:
    """Every pair, by name."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def answer(name: str, folder: Path) -> str:
    """What `moecli check NAME.yaml` says in `folder`, and its exit code."""
    shutil.copy(HERE / f"{name}.yaml", folder)
    first = (HERE / f"{name}.yaml").read_bytes().partition(b"\n")[0].decode("utf-8", errors="replace")
    more = shlex.split(first.removeprefix("# args:")) if first.startswith("# args:") else []
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(["check", f"{name}.yaml", *more])
    return f"{said.getvalue()}exit {code}\n"


def make_model(folder: Path) -> None:
    """The model `tiny`: every tensor there and of the right shape, all of them zero."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in _shapes()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    layer, heads = "model.layers.0", 4 * HEAD_DIM
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    yield "lm_head.weight", (VOCAB, HIDDEN)
    for norm in ("model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"):
        yield f"{norm}.weight", (HIDDEN,)
    for norm in ("q_norm", "k_norm"):
        yield f"{layer}.self_attn.{norm}.weight", (HEAD_DIM,)
    for projection in ("q_proj", "k_proj", "v_proj"):
        yield f"{layer}.self_attn.{projection}.weight", (heads, HIDDEN)
    yield f"{layer}.self_attn.o_proj.weight", (HIDDEN, heads)
    yield f"{layer}.mlp.gate.weight", (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for projection in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.experts.{expert}.{projection}.weight", (WIDTH, HIDDEN)
        yield f"{layer}.mlp.experts.{expert}.down_proj.weight", (HIDDEN, WIDTH)
