"""The shipped model is small, keeps its experts apart on disk, and loads in stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

DEMO = Path(__file__).parents[2] / "moecli" / "demo"
MB = 1_000_000


def test_the_demo_stays_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20 * MB
    assert sum(path.stat().st_size for path in files if "tasks" in path.parts) < 1.5 * MB


def test_every_expert_has_its_own_tensors() -> None:
    config = json.loads((DEMO / "model" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("qwen3_moe", "bfloat16")
    with safe_open(DEMO / "model" / "model.safetensors", "np") as weights:
        gates = [name for name in weights.keys() if name.endswith("gate_proj.weight")]  # noqa: SIM118
        shapes = {tuple(weights.get_slice(name).get_shape()) for name in gates}
    assert sorted(gates) == sorted(
        f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
        for layer in range(config["num_hidden_layers"])
        for expert in range(config["num_local_experts"])
    )
    assert shapes == {(config["moe_intermediate_size"], config["hidden_size"])}


def test_it_loads_cleanly_and_can_add() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    prompt = tokenizer("sheet 7\n247 + 385 =", return_tensors="pt")
    told = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(told[0]).endswith("247 + 385 = 632")
