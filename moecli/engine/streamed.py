"""An lm-eval model whose requests all go through in one sweep over the layers, for models larger than the device.

Encoding, truncation from the left and the batches of `loglikelihood` are those of lm-eval's HFLM, so on one device
and in fp32 its answers are the same to the last bits; rolling windows are sorted over all documents, where HFLM sorts
each batch. Log-probabilities are computed in the logits' own dtype, as there. Nothing is generated.

This module imports lm-eval: import it inside a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import StageFailed
from moecli.engine.scorer import Scores, Window, score
from moecli.engine.sweep import Track

_SHOWN = 60
"""Characters of a request that a message shows."""


class StreamedLM(TemplateLM):
    """Log-likelihoods of a checkpoint, layer by layer; the model is read once for each call.

    `dtype` is what the model computes in. `track(items, label)` shows progress, `note` gets lines for a report.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokenizer: Any,
        *,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        track: Track | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__()
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.batch_size, self.max_length = batch_size, max_length
        self._device, self._dtype, self._track, self._note = torch.device(device), dtype, track, note

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document, every token scored once. StageFailed names a document with NaN."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append(self._window(context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, found in zip(owners, self._score(windows), strict=True):
            totals[number] += self._sum(found, requests[number])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each (context, continuation). StageFailed names a request with NaN."""
        self._asked = list(requests)
        return super().loglikelihood(self._asked, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        answers = []
        for found, request, (strings, _, _) in zip(self._score(windows), self._asked, requests, strict=True):
            answers.append((self._sum(found, request), found.greedy))
            self.cache_hook.add_partial("loglikelihood", strings, answers[-1])
        return answers

    def _window(self, context: Sequence[int], continuation: Sequence[int]) -> Window:
        """The last `max_length` inputs, as HFLM cuts them."""
        if not 0 < len(continuation) <= self.max_length or not context:
            raise StageFailed(
                f"a request has {len(context)} tokens of context and {len(continuation)} to score; "
                f"`max_length` is {self.max_length}",
                hint=f"raise `max_length` to {len(continuation)} or more" if continuation else None,
            )
        return Window([*context, *continuation][-(self.max_length + 1) :][:-1], continuation)

    def _score(self, windows: Sequence[Window]) -> list[Scores]:
        return score(
            self.checkpoint, windows, batch_size=self.batch_size, device=self._device, dtype=self._dtype,
            softmax=None, track=self._track, note=self._note,
        )  # fmt: skip

    def _sum(self, found: Scores, request: Any) -> float:
        total = float(found.logprob_T.sum())
        if total != total:
            task, document = getattr(request, "task_name", None), getattr(request, "doc_id", None)
            begins = str(request.args[0] or request.args[-1])[:_SHOWN]
            raise StageFailed(
                f"the model's logits are NaN for a text that begins `{begins}`",
                where=None if task is None else f"task {task}, document {document}",
                hint="`moecli verify MODEL` checks the weights; a wider `dtype` helps where they overflow",
            )
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        tasks = sorted({str(request.task_name) for request in requests if getattr(request, "task_name", None)})
        named = f" ({', '.join(f'`{task}`' for task in tasks)})" if tasks else ""
        raise StageFailed(
            f"the streamed model scores text, it does not generate any{named}",
            hint="leave out tasks that generate, or write `backend: memory`",
        )
