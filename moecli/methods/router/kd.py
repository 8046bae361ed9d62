"""Train the router alone so that the model predicts what the source predicts (Router KD).

L = tau^2 / N sum_t mask_{t+1} KL(p_source(t) || p_model(t)) over the full vocabulary, softened by tau; AdamW on the
rows of all routers (about 0.04 % of the weights), everything else stays as it is. Works on any form: pruned, one row
for each merged expert, all rows behind an alias map, or quantized, where routers learn what rounding has left of the
experts, whose codes stay as they are.

Memory: the source runs first, one layer at a time, and leaves the last hidden state of each token (2 bytes x width,
in CPU memory), from which its logits over the full vocabulary are computed again when they are needed: exact, without
two models at once. The trained model is whole on the device; its layers are recomputed on the way back. Rows are
kept in fp32 while they are trained. Correction biases are not trained: gradients do not reach a selection.

Text is that of the newest `calibrate/...` stage. The paper takes 3,000 x 512 tokens of C4, learning rate 5e-5, batches
of 2 x 4, one epoch, tau 1, and does not state weight decay (none here).

Source: arXiv 2603.02217.

- run: router/kd
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moecli.core.artifacts import CalibrationStats, CalibrationText, Checkpoint, PartWriter
from moecli.core.context import Context
from moecli.core.errors import StageFailed
from moecli.core.stage import Options, stage
from moecli.engine.data import Batch, batches_of
from moecli.engine.flow import Recorder, Replaced
from moecli.engine.sweep import sweep
from moecli.families import adapter, family_of

HEAD_TOKENS = 1024
"""Tokens whose logits over the vocabulary are held at a time, by each of the two."""


class Kd(Options):
    """Options of `router/kd`."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Of AdamW, constant."""
    batch_size: PositiveInt = 2
    """Sequences in one pass."""
    accumulate: PositiveInt = 4
    """Passes in one step."""
    epochs: PositiveInt = 1
    """Times the text is gone through, each time in another order."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of both distributions."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that both models compute in; `auto` is the checkpoint's."""


@stage("router/kd", version=1)
def kd(opt: Kd, model: Checkpoint, source: Checkpoint, text: CalibrationText, ctx: Context) -> Checkpoint:
    if isinstance(text, CalibrationStats) and text.text is None:
        raise StageFailed("these statistics have no text of their own", hint="add a `calibrate/text` stage above")
    batches = batches_of(text, opt.batch_size)
    dtype = None if opt.dtype == "auto" else getattr(torch, opt.dtype)
    taught = last_hidden(source, batches, dtype, ctx)
    student = Student(model, source, ctx.device, dtype)
    losses = train(student, batches, taught, opt, ctx)
    with ctx.writer(model) as out:
        out.part("routers", student.write)
    _tell(losses, ctx)
    return out.checkpoint


def last_hidden(source: Checkpoint, batches: list[Batch], dtype: torch.dtype | None, ctx: Context) -> list[Tensor]:
    """What the last decoder layer of the source makes of each batch, [B, S, D] on the CPU."""
    found: list[Tensor] = []
    swept = sweep(source, batches, device=ctx.device, dtype=dtype, track=ctx.track)
    for layer in swept:
        if layer.index == len(swept) - 1:
            found = [hidden.cpu() for hidden in layer.outputs()]
    return found


class Student:
    """The model that is trained: stock modules with fp32 masters of the router rows."""

    def __init__(self, model: Checkpoint, source: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> None:
        self._checkpoint = model
        self.network = adapter.load_model(model, device, dtype).requires_grad_(False)
        self._prefix, self._layers = adapter.decoder_layers(self.network)
        model, source = adapter.dense(model), adapter.dense(source)
        names = adapter.tensor_map(self.network, model)
        _refuse_other_ends(model, source, names.outside)
        family, parameters = family_of(model.config), dict(self.network.named_parameters())
        self.rows: dict[str, nn.Parameter] = {}
        self.masters: dict[str, Tensor] = {}
        for layer in model.facts.moe_layers:
            for name, tensor in family.router_names(layer, model).items():
                if tensor.role != "correction":
                    self.rows[name] = parameters[names.targets[name]].requires_grad_(True)
                    self.masters[name] = model.get(name).to(device).float().requires_grad_(True)
        for layer in self._layers:
            layer.forward = _recomputed(layer.forward)

    def logits(self, batch: Batch) -> Tensor:
        """Last hidden states would do, but every family ends in its own way: [B, S, vocabulary], with a graph."""
        device = next(iter(self.rows.values())).device
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        return self.network(input_ids=ids, attention_mask=mask, use_cache=False).logits

    @torch.no_grad()
    def taught(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The source's logits from its last hidden state: the norm and head of both are the same."""
        recorders = [Recorder(layer) for layer in self._layers]
        recorders[-1].answer = hidden.to(next(iter(self.rows.values())).device)
        with Replaced(self.network, self._prefix, recorders):
            return self.logits(batch)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, row in self.rows.items():
            self.masters[name].grad = None if row.grad is None else row.grad.float()
            row.grad = None
        optimizer.step()
        with torch.no_grad():
            for name, row in self.rows.items():
                row.copy_(self.masters[name])

    def write(self, part: PartWriter) -> None:
        for name, master in self.masters.items():
            spec = self._checkpoint.spec(name)
            part.put(name, master.detach().to("cpu", getattr(torch, spec.dtype)).view(spec.shape).contiguous())


def train(student: Student, batches: list[Batch], taught: list[Tensor], opt: Kd, ctx: Context) -> list[float]:
    """Mean divergence a token of each step, before it was taken."""
    optimizer = torch.optim.AdamW(list(student.masters.values()), lr=opt.learning_rate, weight_decay=0.0)
    order = [i for _ in range(opt.epochs) for i in torch.randperm(len(batches), generator=ctx.rng).tolist()]
    steps = [order[i : i + opt.accumulate] for i in range(0, len(order), opt.accumulate)]
    losses = []
    for some in ctx.track(steps, "training routers"):
        tokens = sum(int(batches[i].attention_mask[:, 1:].sum()) for i in some)
        total = torch.zeros((), device=ctx.device)
        for i in some:
            divergence = summed_divergence(student.taught(batches[i], taught[i]), student.logits(batches[i]),
                                           batches[i].attention_mask.to(ctx.device), opt.tau)  # fmt: skip
            (divergence * opt.tau**2 / max(tokens, 1)).backward()
            total += divergence.detach()
        student.step(optimizer)
        losses.append(total / max(tokens, 1))
    found = torch.stack(losses).tolist()
    if not all(value == value and abs(value) != float("inf") for value in found):
        raise StageFailed("the divergence from the source is not a number", hint="lower `learning_rate`")
    return found


def summed_divergence(teacher_BSV: Tensor, student_BSV: Tensor, mask_BS: Tensor, tau: float = 1.0) -> Tensor:
    """Sum over positions whose next token exists of KL(softmax(teacher/tau) || softmax(student/tau)), in nats."""
    valid = mask_BS[:, 1:].flatten() != 0
    teacher, student = (logits[:, :-1].flatten(0, 1)[valid] for logits in (teacher_BSV, student_BSV))
    total = student.new_zeros((), dtype=torch.float32)
    for p, q in zip(teacher.split(HEAD_TOKENS), student.split(HEAD_TOKENS), strict=True):
        p, q = ((logits.float() / tau).log_softmax(-1) for logits in (p, q))
        total = total + functional.kl_div(q, p, reduction="sum", log_target=True)
    return total


def _recomputed(forward: Any) -> Any:
    """The same layer, its inside computed again on the way back; stays in eval mode, unlike transformers' own."""
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _refuse_other_ends(model: Checkpoint, source: Checkpoint, outside: Any) -> None:
    """Logits are computed with the model's own norm and head: they must be the source's."""
    for name in outside:
        if name not in source or not torch.equal(model.get(name), source.get(name)):
            raise StageFailed(
                f"`{name}` differs from the source's, whose predictions are the target",
                hint="train the router before stages that change embeddings or the head",
            )


def _tell(losses: list[float], ctx: Context) -> None:
    ctx.record("kd_loss", losses)
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    ctx.note(
        f"divergence from the source on the training text went from {first:.4f} to {last:.4f} nats a token "
        f"in {len(losses)} steps (means of the first and last {tenth})"
    )
