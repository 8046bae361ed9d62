"""Recipes that `moecli init` writes: each runs as it is, and says what to change."""

from __future__ import annotations

_HEAD = "recipe: 1                          # version of the recipe format\n"

STARTERS: dict[str, str] = {
    "demo": f"""\
# Halve the experts of the built-in demo model, round the rest to 4 bits, and see what it costs.
# Minutes on a laptop, no network: moecli run FILE
{_HEAD}model: demo                        # or a folder, or a hub id such as Qwen/Qwen3-30B-A3B
seed: 0                            # decides everything random
stages:
  - run: calibrate/statistics      # text through the model, layer by layer
    with: {{dataset: demo, samples: 64, tokens_per_sample: 512}}
  - run: prune/reap                # keep the experts whose outputs weigh most
    with: {{keep: 8}}                # of 16 per layer; `moecli inspect demo` shows them
  - run: quantize/rtn
    with: {{bits: 4, group_size: 128}}
  - run: eval/lm-eval              # on the source model as well, so every number has its baseline
    with: {{include: demo, tasks: [demo_arithmetic, demo_tables]}}
""",
    "prune": f"""\
# Half of the experts of a hub model, then INT4. Loads with plain transformers and vLLM.
{_HEAD}model: Qwen/Qwen3-30B-A3B
seed: 0
stages:
  - run: calibrate/statistics
    with:
      dataset: "Salesforce/wikitext[wikitext-2-raw-v1](train)" # or my/text.jsonl: one {{"text": ...}} a line
      samples: 128
      tokens_per_sample: 2048
  - run: prune/reap                # or prune/frequency, the baseline every method should beat
    with: {{keep: 64}}               # of 128 experts per layer
  - run: quantize/rtn
    with: {{bits: 4, group_size: 128}}
  - run: eval/lm-eval
    with: {{tasks: [arc_easy, arc_challenge, hellaswag, winogrande]}}
""",
    "merge": f"""\
# Merge similar experts instead of dropping any; every router row stays, an alias map folds them.
{_HEAD}model: Qwen/Qwen3-30B-A3B
seed: 0
stages:
  - run: calibrate/statistics
    with: {{dataset: "Salesforce/wikitext[wikitext-2-raw-v1](train)", samples: 128, tokens_per_sample: 2048}}
  - run: cluster/hc-smoe           # decides which experts are alike; changes nothing yet
    with: {{keep: 64, linkage: average}}
  - run: merge/weighted            # one expert of each cluster, weighted by use
  # - run: router/row-drop         # one router row per merged expert: loads everywhere, a little less exact
  - run: eval/lm-eval
    with: {{tasks: [arc_easy, hellaswag]}}
export: auto                       # stock where exact, else compact; `expanded` and `research` write full size
""",
    "quantize": f"""\
# Only fewer bits per weight; needs no calibration.
{_HEAD}model: Qwen/Qwen3-30B-A3B
stages:
  - run: quantize/rtn
    with: {{bits: 8, group_size: 128}}
  - run: eval/lm-eval
    with: {{tasks: [arc_easy, hellaswag], limit: 200}}
""",
}
"""Name for `--from` -> text of the recipe."""
