"""Estimates the GPU memory of an actor with its rollout, by part. The module can be imported
without torch.

Weights, adapters, optimizer, kept outputs and KV cache follow from shapes. The rest is estimated:

- Activations of the layer that runs in the backward pass, for each token: four tensors of the MLP's
  inner size, four of the hidden size and two of q, k and v, in 16 bits. In a mixture of experts the
  inner sizes of a token's experts add up, and three tensors hold a row of the hidden size for each
  expert. The larger of a layer's two stacks of experts is decoded at a time. An adapter on
  the experts saves the rows that go into either stack, and the rollout holds it in 16 bits.
- Log-probabilities: two tensors of logits in 16 bits and one chunk in float32. With verl's
  ``use_fused_kernels``: one chunk of :data:`qerl_verl.kernels.linear_logprobs.CHUNK_BYTES` in
  float32 with two temporaries.
- Memory that a sleeping engine and each process hold beside their tensors: :data:`ASLEEP` and
  :data:`CONTEXT`, as measured on an H100.

``tests/memory/test_estimate.py`` compares the estimates with measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

GIB = 2**30
ACTIVATION, MASTER = 2, 4
"""Bytes of a 16-bit activation, and of an adapter's float32 master weight."""

CONTEXT = int(0.5 * GIB)
"""Bytes of a process that uses CUDA, beside its tensors: context, kernels, communication."""

ASLEEP = int(2.3 * GIB)
"""Bytes that vLLM holds while it sleeps at level 1: its context and captured CUDA graphs (7B and
32B on an H100)."""

GRAPHS = int(1.5 * GIB)
"""Part of the engine's memory while it generates: CUDA graphs and its largest activations. vLLM's
``gpu_memory_utilization`` counts it, but not the engine's context, which is there when vLLM begins
to count (vllm/v1/worker/gpu_worker.py, init_device)."""

LOGITS_CHUNK = 512 << 20
ENTROPY_CHUNK = 2048
"""Tokens per chunk in verl's entropy_from_logits_with_chunking."""

MARGIN = 0.1
"""Equals :data:`qerl_verl.engine.recompute.MARGIN`."""


@dataclass(frozen=True)
class Model:
    """The shapes of a decoder.

    Attributes:
        layers: decoder layers.
        hidden, inner, vocabulary: sizes. With experts, ``inner`` is the sum over the experts of a
            token in one layer.
        query, key: output channels of q_proj, and of k_proj and v_proj each.
        packed: bytes of the NVFP4 linears with their scales.
        plain: bytes of everything else, in 16 bits.
        adapter: number of parameters of the LoRA adapter.
        of_experts: number of those on experts. Those on other layers are not counted in the
            rollout, where they are a hundredth of the base.
        chosen: number of experts of a token; 0 in a dense model.
        decoded: bytes of the experts' weights that a layer decodes at a time.
    """

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    query: int
    key: int
    packed: int
    plain: int
    adapter: int
    of_experts: int = 0
    chosen: int = 0
    decoded: int = 0

    @property
    def base(self) -> int:
        return self.packed + self.plain

    @property
    def kept_a_token(self) -> int:
        """Bytes per token that ``qerl.recompute`` keeps in a layer: outputs of all but
        down_proj."""
        return ACTIVATION * (self.query + 2 * self.key + self.hidden + 2 * self.inner)

    @property
    def cache_a_token(self) -> int:
        """Bytes per token of the KV cache of all layers, in 16 bits."""
        return ACTIVATION * 2 * self.key * self.layers


@dataclass(frozen=True)
class Run:
    """The settings of a run that decide about memory.

    Attributes:
        ranks: number of ranks of the actor.
        parallel: number of GPUs that share one rollout model.
        shared: whether actor and rollout use one copy of the base.
        recompute: ``qerl.recompute``.
        tokens: number of tokens of a micro-batch on one GPU.
        sequence: largest number of tokens of prompt and response together.
        sequences: number of sequences that one engine has to serve at once.
        fused_logits: verl's ``use_fused_kernels``.
        utilization: ``rollout.gpu_memory_utilization``.
        param_offload, optimizer_offload: the actor's settings of these names.
        sleeps: whether the engine leaves the GPU while the actor trains.
        sleep_level: ``qerl.rollout.sleep_level``.
    """

    ranks: int
    parallel: int
    shared: bool
    recompute: str
    tokens: int
    sequence: int
    sequences: int
    fused_logits: bool
    utilization: float
    param_offload: bool = False
    optimizer_offload: bool = False
    sleeps: bool = True
    sleep_level: int = 1


@dataclass
class Estimate:
    """The memory of one GPU, in bytes.

    Attributes:
        total: memory of the GPU.
        generating: part -> bytes while the rollout generates.
        training: part -> bytes at the peak of an update.
        host: part -> bytes of main memory for each GPU, beside what the processes themselves take.
        kept_layers: number of layers that keep their outputs for the backward pass.
        cache_tokens: number of tokens that fit into the KV cache.
        problems: one sentence for each part that does not fit.
    """

    total: int
    generating: dict[str, int] = field(default_factory=dict)
    training: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    kept_layers: int = 0
    cache_tokens: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(sum(self.generating.values()), sum(self.training.values()))


def estimate(model: Model, run: Run, total: int) -> Estimate:
    """Estimates the memory of a run on a GPU with ``total`` bytes."""
    out = Estimate(total)
    adapter = MASTER * model.adapter // run.ranks
    base = model.base if run.shared else model.base // run.ranks
    trains = {"adapters": adapter, "optimizer": 2 * adapter}
    resident = {"base": base, **trains}
    out.training = {**resident, "gradients": adapter, **_activations(model, run), "actor's context": CONTEXT}
    engine = int(run.utilization * total)
    if not run.shared and run.ranks > 1:
        out.training["gathered layers"] = 2 * model.packed // model.layers
    out.training["sleeping rollout" if run.sleeps else "rollout"] = ASLEEP if run.sleeps else engine
    if run.recompute == "selective":
        out.kept_layers = model.layers
    elif run.recompute == "auto":
        out.kept_layers = _kept_layers(model, run, total, out.training)
    out.training["kept outputs"] = out.kept_layers * run.tokens * model.kept_a_token

    waiting = dict(resident)
    if run.param_offload:
        waiting["adapters"] = 0
        waiting["base"] = base if run.shared else 0
    if run.optimizer_offload:
        waiting["optimizer"] = 0
    copy = 0 if run.shared else model.base // run.parallel
    held = ACTIVATION * model.of_experts // run.parallel
    cache = max(0, engine - copy - held - GRAPHS)
    contexts = {"actor's context": CONTEXT, "rollout's context": CONTEXT}
    out.generating = {**waiting, **contexts, "rollout's base": copy, "KV cache": cache}
    out.generating |= {"rollout's adapter": held} if held else {}
    out.generating["graphs and activations of the rollout"] = GRAPHS
    out.cache_tokens = cache * run.parallel // model.cache_a_token
    if run.sleeps and run.sleep_level == 1 and not run.shared:
        out.host["rollout's base while it sleeps"] = copy
    if run.param_offload:
        out.host["actor's parameters"] = adapter + (0 if run.shared else base)
    if run.optimizer_offload:
        out.host["optimizer"] = 2 * adapter
    out.problems = _problems(model, run, out)
    return out


def _activations(model: Model, run: Run) -> dict[str, int]:
    experts = model.chosen * model.hidden + model.inner
    width = 4 * model.inner + (4 + 3 * model.chosen) * model.hidden + 2 * (model.query + 2 * model.key)
    if run.fused_logits:
        logits = LOGITS_CHUNK * 5 // 2
    else:
        logits = 2 * ACTIVATION * run.tokens * model.vocabulary + 4 * min(run.tokens, ENTROPY_CHUNK) * model.vocabulary
    return {
        "inputs of the layers": model.layers * run.tokens * model.hidden * ACTIVATION,
        "activations of one layer": run.tokens * width * ACTIVATION,
        "logits": logits,
        **({"decoded experts": model.decoded} if model.decoded else {}),
        **({"inputs of the experts": ACTIVATION * run.tokens * experts} if model.of_experts else {}),
    }


def _kept_layers(model: Model, run: Run, total: int, training: dict[str, int]) -> int:
    """Returns the number of layers that :class:`qerl_verl.engine.recompute.Recompute` keeps."""
    need = sum(training[part] for part in _activations(model, run))
    taken = sum(training.values()) - need - training["gradients"]
    room = (1 - MARGIN) * (total - taken - (1 + MARGIN) * need)
    return max(0, min(model.layers, int(room / (run.tokens * model.kept_a_token))))


def _problems(model: Model, run: Run, out: Estimate) -> list[str]:
    problems = []
    for phase, parts in (("generating", out.generating), ("training", out.training)):
        if (taken := sum(parts.values())) > out.total:
            problems.append(f"{phase} takes {taken / GIB:.1f} GiB of {out.total / GIB:.1f}")
    if out.cache_tokens < run.sequence:
        problems.append(
            f"the KV cache has room for {out.cache_tokens} tokens, which is less than one sequence of {run.sequence}"
        )
    return problems


CHANGES = (
    ("qerl.base=shared", lambda run: replace(run, shared=True), lambda run: not run.shared and run.parallel == 1),
    (
        "actor_rollout_ref.actor.fsdp_config.param_offload=True",
        lambda run: replace(run, param_offload=True),
        lambda run: not run.param_offload and not run.shared,
    ),
    (
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
        lambda run: replace(run, optimizer_offload=True),
        lambda run: not run.optimizer_offload,
    ),
)
"""Settings that save memory: the text of the override, its effect, and where it can help."""


def propose(model: Model, run: Run, total: int) -> list[str] | None:
    """Returns the fewest settings with which a run fits that does not; None if there are none.

    First fewer tokens in a micro-batch and another share for the rollout are tried, then each of
    :data:`CHANGES` in addition.
    """
    chosen, changed = run, []
    for change in (None, *CHANGES):
        if change is not None:
            text, apply, helps = change
            if not helps(chosen):
                continue
            chosen, changed = apply(chosen), [*changed, text]
        if (found := _fit(model, chosen, total)) is not None:
            out = list(changed)
            if found.tokens != run.tokens:
                out.append(f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={found.tokens}")
            if found.utilization != run.utilization:
                out.append(f"actor_rollout_ref.rollout.gpu_memory_utilization={found.utilization:.2f}")
            return out
    return None


def _fit(model: Model, run: Run, total: int) -> Run | None:
    """Returns the variant of a run with the most tokens in a micro-batch that fits, or None.

    It keeps at least one sequence in a micro-batch, and the largest share for the rollout that
    fits, up to the run's own.
    """
    tokens = run.tokens
    while tokens >= run.sequence:
        for step in range(int(round(run.utilization * 100)), 4, -1):
            found = replace(run, tokens=tokens, utilization=step / 100)
            if not estimate(model, found, total).problems:
                return found
        tokens = max(run.sequence, tokens // 2) if tokens > run.sequence else 0
    return None
