"""Every figure a step reports: its name, unit and meaning, in one table.

`docs/objectives.md` ends in this table, and a test keeps the two and the steps' own output equal. A figure
without a value, such as the mismatch of a step without fresh tokens, is null (None).
"""

from __future__ import annotations

from dataclasses import dataclass

Metrics = dict[str, float | None]
"""Figures by name."""


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    """As in `metrics.jsonl`; `<s>` stands for a staleness in steps, `<part>` for a part of the reward."""
    unit: str
    """Such as `tokens`; `-` for a pure number."""
    meaning: str
    """What it is of, and over what it is taken."""


METRICS = (
    Metric("step", "version", "t: the version that was trained"),
    Metric("loss", "loss", "of the batch, penalties included; mean over its mini-batches"),
    Metric("grad_norm", "loss / weight", "global norm before clipping; the largest of the mini-batches"),
    Metric("skipped", "updates", "optimizer steps left out: gradient not finite, or nothing to train"),
    Metric("lr", "-", "learning rate"),
    Metric("tokens", "tokens", "trained, by the loss masks"),
    Metric("samples", "samples", "trained"),
    Metric("groups", "groups", "trained"),
    Metric("groups_dropped", "groups", "fewer than 2 valid samples"),
    Metric("samples_invalid", "samples", "generation or reward failed"),
    Metric("samples_masked", "samples", "left out by overlong = mask"),
    Metric("micro_batches", "forward passes", "of this rank, with gradient"),
    Metric("reward_mean", "reward", "of valid samples, as the reward function gave it"),
    Metric("reward_std", "reward", "over valid samples, population"),
    Metric("reward_constant", "share of groups", "equal rewards: nothing to learn from"),
    Metric("reward_shaped", "reward", "of trained samples, after overlong penalty and KL in the reward"),
    Metric("reward/<part>", "reward", "mean of a named part over valid samples that have it"),
    Metric("advantage_mean", "advantage", "over trained samples"),
    Metric("advantage_std", "advantage", "over trained samples, population"),
    Metric("advantage_max", "advantage", "largest absolute value"),
    Metric("advantage_zero", "share of samples", "without effect on the policy"),
    Metric("answer_length_mean", "tokens", "generated, of valid samples"),
    Metric("answer_length_max", "tokens", "generated, of valid samples"),
    Metric("trained_length_mean", "tokens", "inside the loss mask, of trained samples"),
    Metric("truncated", "share of samples", "valid ones cut off at the token limit"),
    Metric("staleness_mean", "steps", "of a group: t minus its oldest version"),
    Metric("staleness_p50", "steps", "median over groups"),
    Metric("staleness_p90", "steps", "9 groups in 10 are at most so old"),
    Metric("staleness_max", "steps", "of a group"),
    Metric("token_staleness_mean", "steps", "of a trained token: t minus the version that wrote it"),
    Metric("token_staleness_p50", "steps", "median over trained tokens"),
    Metric("token_staleness_p90", "steps", "9 trained tokens in 10 are at most so old"),
    Metric("token_staleness_max", "steps", "of a trained token"),
    Metric("entropy", "nats", "of pi, mean over trained tokens"),
    Metric("ratio_deviation_max", "-", "largest |pi_p / mu - 1| of a trained token"),
    Metric("mismatch_k1", "nats", "KL(mu || pi_p) by k1 over tokens that version t wrote; null without any"),
    Metric("mismatch_k3", "nats", "the same by k3: engine against learner at equal weights"),
    Metric("kl_k1", "nats", "off-policy KL(mu || pi_p) by k1: mean of log mu - log pi_p"),
    Metric("kl_k3", "nats", "the same by k3: mean of e^d - 1 - d, d = log pi_p - log mu"),
    Metric("kl_k1/<s>", "nats", "kl_k1 over tokens of staleness s"),
    Metric("kl_k3/<s>", "nats", "kl_k3 over tokens of staleness s"),
    Metric(
        "kl_reference_k1", "nats", "KL(pi || ref) by k1, mean over trained tokens; null without a reference"
    ),
    Metric("kl_reference_k3", "nats", "the same by k3"),
    Metric("clip_fraction", "share of tokens", "that a bound of the loss reached"),
    Metric("clip_low", "share of tokens", "at the loss's lower clip"),
    Metric("clip_high", "share of tokens", "at the loss's upper clip or cap"),
    Metric("clip_dual", "share of tokens", "at the dual clip"),
    Metric("weight_mean", "-", "of the correction"),
    Metric("weight_truncated", "share of tokens", "whose ratio the correction cut down to its cap"),
    Metric("masked", "share of tokens", "that the correction gives weight 0"),
    Metric("ess", "share of tokens", "effective sample size (sum w)^2 / (n sum w^2) of the weights"),
    Metric("ess_raw", "share of tokens", "the same of the ratios pi_p / mu as they are"),
    Metric("first_weight", "-", "vtrace: mean weight of an answer's first trained token; null otherwise"),
    Metric("seconds", "s", "of the whole step"),
    Metric("seconds_pack", "s", "advantages; choosing and packing, where several ranks have a say"),
    Metric("seconds_score", "s", "forward passes without gradient: pi_p, reference"),
    Metric("seconds_forward", "s", "forward passes with gradient"),
    Metric("seconds_backward", "s", "backward passes, gradients summed over ranks"),
    Metric("seconds_update", "s", "gradient clipping and optimizer"),
    Metric(
        "tflops",
        "TFLOP/s",
        "of a rank: the model's FLOPs for what was trained, over `seconds`; see `learner.flops`",
    ),
    Metric("mfu", "share", "tflops over what the GPU can do at its best; null without a GPU that is known"),
    Metric("seconds_wait", "s", "without a batch to train"),
    Metric("seconds_fetch", "s", "reading, decoding and packing the batch, while the step before trained"),
    Metric(
        "seconds_publish", "s", "that the step waited for its version to be exported, digested and committed"
    ),
    Metric(
        "seconds_checkpoint", "s", "that the step waited for a checkpoint: to be begun, copied, committed"
    ),
    Metric("seconds_saving", "s", "that the newest complete checkpoint took, beside the training"),
    Metric("seconds_push", "s", "of each actor's last version, in staging and in applying"),
    Metric("seconds_export", "s", "of the thread that made the last image of weights, beside the training"),
    Metric("weights_bytes", "bytes", "of the images of weights that are held, and of the one in reserve"),
    Metric("queued", "groups", "ready and left in the queue"),
    Metric("tokens_per_second", "tokens/s", "trained, since the first step began"),
    Metric("time_batch", "s since 1970", "when the learner began to look for the batch"),
    Metric("time", "s since 1970", "when the step was published"),
)


def row_of(name: str) -> Metric | None:
    """The table's row for a reported name, such as `kl_k3/<s>` for `kl_k3/2`; None if it has none."""
    stem, slash, _ = name.partition("/")
    for metric in METRICS:
        if metric.name == name or (slash and metric.name.startswith(stem + "/<")):
            return metric
    return None


def table() -> str:
    """The table in Markdown."""
    rows = [
        f"| `{metric.name}` | {metric.unit} | {metric.meaning.replace('|', chr(92) + '|')} |"
        for metric in METRICS
    ]
    return "\n".join(["| name | unit | meaning |", "|---|---|---|", *rows]) + "\n"
