"""A report put together: the headline of figures, then the sections that the records have figures for."""

from collections.abc import Callable, Sequence

import numpy as np

from hpcmoe.messages import one_line
from hpcmoe.report.page.comparison import compare_runs, find_rate
from hpcmoe.report.page.contents import Headline, Report, ReportSection
from hpcmoe.report.page.inputs import make_inputs
from hpcmoe.report.page.links import describe_busiest, make_links_section
from hpcmoe.report.page.living import make_living
from hpcmoe.report.page.load import describe_hottest, find_moves, make_balance, make_load
from hpcmoe.report.page.memory import make_memory
from hpcmoe.report.page.numbers import format_short
from hpcmoe.report.page.recorded import RecordedRun
from hpcmoe.report.page.training import describe_exposed, find_predicted, find_stages, make_learning, make_speed

_SECTIONS: dict[str, Callable[[RecordedRun], ReportSection | None]] = {
    "Learning": make_learning,
    "Speed": make_speed,
    "Expert load": make_load,
    "Balance": make_balance,
    "Links": make_links_section,
    "Placement": make_living,
    "Memory": make_memory,
    "Inputs": make_inputs,
}


def assemble_report(runs: Sequence[RecordedRun]) -> Report:
    """Make the report of one run, or of several beside each other."""
    if len(runs) == 1:
        return report_run(runs[0])
    subtitle = "; ".join(f"{run.name}: {run.num_steps} steps on {run.describe_cluster()}" for run in runs)
    headlines = [
        Headline(name=run.name, value=format_short(find_rate(run) or 0.0), unit="tokens/s", note=describe_loss(run))
        for run in runs
    ]
    title = " | ".join(run.name for run in runs)
    return Report(
        title=title,
        subtitle=subtitle,
        headlines=headlines,
        sections=compare_runs(runs),
        notes=[run.path for run in runs],
    )


def report_run(run: RecordedRun) -> Report:
    """Make the report of one run."""
    sections, notes = [], [run.path]
    for name, make in _SECTIONS.items():
        try:
            section = make(run)
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError) as error:  # of a damaged record
            notes.append(f"{name} is left out: what the record holds of it does not fit together: {one_line(error)}")
        else:
            sections += [section] if section is not None else []
    return Report(
        title=f"{run.name}: {run.num_steps} steps",
        subtitle=f"{run.describe_cluster()}{describe_model(run)}",
        headlines=make_headlines(run),
        sections=sections,
        notes=notes,
    )


def describe_loss(run: RecordedRun) -> str:
    """Write the last loss of a run."""
    for name, what in (("train/validation_loss", "validation loss"), ("train/loss", "training loss")):
        if (series := run.find_series(name)) is not None:
            return f"{what} {series.values[-1]:.4f}"
    return ""


def describe_model(run: RecordedRun) -> str:
    """Write how large the experts' part of the model is."""
    load = run.find_series("experts/utilisation", 3)
    return f"; {load.values.shape[1]} layers of {load.values.shape[2]} experts" if load is not None else ""


def make_headlines(run: RecordedRun) -> list[Headline]:
    """Choose the figures that the report begins with, those that the record has."""
    seconds, loss = (
        run.find_series("run/seconds"),
        run.find_series("train/validation_loss") or run.find_series("train/loss"),
    )
    found = []
    if (rate := find_rate(run)) is not None:
        found.append(Headline(name="throughput", value=format_short(rate), unit="tokens/s", note="all ranks together"))
    if loss is not None:
        name = "validation loss" if run.find_series("train/validation_loss") else "training loss"
        note = f"{loss.values[0]:.4f} at step {loss.steps[0]}"
        found.append(Headline(name=f"{name}, last", value=f"{loss.values[-1]:.4f}", unit=loss.unit, note=note))
    if seconds is not None:
        note = f"95 % below {format_short(1e3 * float(np.percentile(seconds.values, 95)))} ms"
        median = format_short(1e3 * float(np.median(seconds.values)))
        found.append(Headline(name="step, median", value=median, unit="ms", note=note))
        if stages := find_stages(run):
            exposed = describe_exposed(stages, seconds)
            found.append(
                Headline(name="dispatch, combine, waiting", value=exposed, unit="%", note="of a step's seconds")
            )
    return [*found, *headlines_of_balance(run), *headlines_of_hardware(run)]


def headlines_of_balance(run: RecordedRun) -> list[Headline]:
    """Choose the figures of balance."""
    found = []
    if (balance := run.find_series("experts/balancedness")) is not None:
        note = "mean / max tokens of ranks; 1 is even"
        found.append(Headline(name="balancedness", value=f"{np.nanmean(balance.values):.3f}", unit="", note=note))
    if (load := run.find_series("experts/utilisation", 3)) is not None:
        value, which = describe_hottest(load)
        found.append(Headline(name="hottest expert", value=value, unit="x even", note=which))
    if (sigma := run.find_series("dispatch/link_sigma")) is not None:
        floor = run.find_number("dispatch/link_sigma_floor")
        note = "std / mean of links" + (f"; floor {floor:.3f}" if floor is not None else "")
        found.append(Headline(name="link sigma", value=f"{np.nanmean(sigma.values):.3f}", unit="", note=note))
    return found


def headlines_of_hardware(run: RecordedRun) -> list[Headline]:
    """Choose the figures of links, moves, prediction and memory."""
    found = []
    if (busiest := describe_busiest(run)) is not None:
        found.append(Headline(name="busiest link", value=busiest[0], unit="% used", note=busiest[1]))
    if (hidden := run.find_number("comm/hidden_share")) is not None:
        note = "behind experts' work, in the steps traced"
        found.append(Headline(name="transfers hidden", value=format_short(100 * hidden), unit="%", note=note))
    if moves := find_moves(run):
        found.append(
            Headline(name="experts moved", value=f"{len(moves)}", unit="times", note=f"first at step {moves[0]}")
        )
    seconds = run.find_series("run/seconds")
    if (predicted := find_predicted(run)) is not None and seconds is not None:
        ratio = f"{float(np.median(seconds.values)) / predicted:.2f}"
        note = f"{format_short(1e3 * predicted)} ms predicted"
        found.append(Headline(name="measured / predicted", value=ratio, unit="x", note=note))
    if (peak := run.find_number("run/peak_resident_bytes")) is not None:
        found.append(
            Headline(name="memory at its peak", value=format_short(peak / 1e6), unit="MB", note="fullest process")
        )
    return found
