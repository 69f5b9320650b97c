"""The pictures: loss curves of runs, by matplotlib; the history of records, an SVG alike on every machine."""

from html import escape
from pathlib import Path

from runlog import Group, Record, clean, judge

NEW, PALE, OLD, INK, QUIET, FAINT = "#1664d9", "#9dbff0", "#c77414", "#24292f", "#57606a", "#8b949e"
PUBLIC = (
    "2026-01-30 public record",
    "1555 steps, 8 x NVIDIA H100",
    97.7693,
)  # what train_gpt.py's mathematics is that of


def plot_losses(path: Path, group: Group, old: Group | None, names: tuple[str, str]) -> None:
    """Loss against time and against step; the final points stand enlarged in the first panel's empty corner."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "records"  # the same picture from the same logs
    import matplotlib.pyplot as plt

    figure, (by_time, by_step) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    final = by_time.inset_axes((0.50, 0.52, 0.47, 0.43))
    sets = [(old, OLD, names[1])] if old and old.counted else []
    sets.append((group, NEW, names[0]))
    low, high = group.target, group.target
    for runs, color, name in sets:
        for i, run in enumerate(runs.counted):
            steps = [step for step in run.losses if step in run.times]
            losses = [run.losses[step] for step in steps]
            label = f"{clean(name, 40)} ({len(runs.counted)} run{'s' * (len(runs.counted) > 1)})" if not i else None
            style = dict(color=color, lw=1.3, marker="o", ms=3, alpha=0.75, label=label and label.replace("$", r"\$"))
            by_time.plot([run.times[step] / 1000 for step in steps], losses, **style)
            by_step.plot(steps, losses, **style)
            final.plot(run.seconds, run.loss, "o", color=color, ms=5, alpha=0.75, mec="white", mew=0.5)
            low = min(low, run.loss)
            high = max(high, next(run.losses[step] for step in steps if step >= 0.1 * run.total))
        if runs.loss.n > 1:
            final.errorbar(
                *(runs.time.mean, runs.loss.mean),
                *(runs.loss.error, runs.time.error),
                color=color, capsize=3, lw=1.4, marker="_", ms=12, zorder=3,
            )  # fmt: skip
    for panel in (by_time, by_step, final):
        panel.axhline(group.target, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        panel.grid(color="#d8dee4", lw=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
        panel.tick_params(color=FAINT, labelcolor=INK)
        panel.margins(x=0.02)
    final.margins(0.15, 0.2)
    final.ticklabel_format(useOffset=False)
    final.tick_params(labelsize=8)
    final.locator_params(nbins=4)
    final.set_title("at the end, with mean and standard error", fontsize=9, color=INK)
    if high > low:
        by_time.set_ylim(low - 0.05 * (high - low), high * 1.01)
    by_time.set(xlabel="training time (s)", ylabel="validation loss (nats)")
    by_step.set(xlabel="step")
    by_step.annotate(
        f"target {group.target:g}", (0.01, group.target), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", fontsize=9, color=INK,
    )  # fmt: skip
    if sets[0][0].counted:
        by_step.legend(frameon=False, loc="upper right")
    else:
        figure.suptitle("no complete runs")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def history_svg(records: list[Record], most: int = 20) -> str:
    """Training times of the newest records as bars, the public record they started from on top."""
    rows = [(*PUBLIC, FAINT)]
    for record in [record for record in records if record.group.counted][-most:]:
        group = record.group
        made = f"{' and '.join(map(str, group.steps()))} steps, {'; '.join(group.each('hardware'))}"
        broken = any(rule.holds is False for rule in judge(group))
        rows.append((f"{record.date} {record.name}", made, group.time.mean, PALE if broken else NEW))
    longest = max(row[2] for row in rows)
    height = 46 * len(rows) + 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="840" height="{height}" viewBox="0 0 840 {height}" '
        'font-family="sans-serif" font-size="14" role="img">',
        "<title>Training time of the records</title>",
        f'<rect width="840" height="{height}" fill="#ffffff"/>',
        f'<text x="308" y="26" fill="{INK}" font-weight="bold">Training time, mean of the runs</text>',
    ]
    for i, (name, made, seconds, color) in enumerate(rows):
        y, width = 42 + 46 * i, 370 * seconds / (longest or 1)
        remark = ", no record" if color == PALE else ""
        lines += [
            f'<text x="296" y="{y + 12}" fill="{INK}" text-anchor="end">{escape(clean(name, 38))}</text>',
            f'<text x="296" y="{y + 28}" fill="{QUIET}" text-anchor="end" font-size="11">'
            f"{escape(clean(made, 48))}</text>",
            f'<rect x="308" y="{y}" width="{width:.1f}" height="30" rx="3" fill="{color}"/>',
            f'<text x="{308 + width + 8:.1f}" y="{y + 20}" fill="{INK}">{seconds:.2f} s{remark}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
