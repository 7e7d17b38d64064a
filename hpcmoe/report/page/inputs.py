"""What runs were given: their keys with the defaults, the versions that computed, where they were."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np

from hpcmoe.messages import one_line, show_value
from hpcmoe.overrides import parse_value
from hpcmoe.report.page.contents import DataTable, ReportSection
from hpcmoe.report.page.recorded import RecordedRun

_OVERRIDE = "# --set "  # begins the lines that a run adds to its config


def make_inputs(run: RecordedRun) -> ReportSection | None:
    """Show what the run was given: its keys, the versions that computed, the cluster."""
    parts = (
        ("config", "Config, as given", read_given(run)), ("versions", "Versions", run.find_pairs("run/versions")),
        ("cluster", "Cluster", describe_place(run)),
    )  # fmt: skip
    tables = [
        DataTable(name=name, title=title, headers=("", "value"), rows=[*found.items()], folded=len(found) > 12)
        for name, title, found in parts
        if found
    ]
    sentence = "What the run was given, what computed it, and where."
    return ReportSection(anchor="inputs", title="Inputs", sentence=sentence, tables=tables) if tables else None


def read_all_keys(run: RecordedRun) -> dict[str, str]:
    """Read the config of a run, with the defaults of today -> values by `section.key`, as shown."""
    return flatten(tomllib.loads((files("hpcmoe") / "run.toml").read_text(encoding="utf-8"))) | read_given(run)


def read_given(run: RecordedRun) -> dict[str, str]:
    """Read the keys that a run was given, by its file and by --set -> values by `section.key`, as shown."""
    text = str(run.values.get("run/config", ""))
    try:
        given = flatten(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError):
        given = {}
    for line in text.splitlines():
        if line.startswith(_OVERRIDE):
            name, _, value = line.removeprefix(_OVERRIDE).partition("=")
            is_toml, parsed = parse_value(value)
            given[one_line(name.strip())] = show_value(parsed if is_toml else value)
    return given


def flatten(sections: Mapping[str, Any]) -> dict[str, str]:
    """Flatten sections of keys -> values by `section.key`."""
    found = {}
    for section, keys in sections.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            found[one_line(f"{section}.{key}")] = show_value(value)
    return found


def describe_place(run: RecordedRun) -> dict[str, str]:
    """Describe where a run was -> by what is described."""
    rates = run.find_array("cluster/bytes_per_second", 2)
    found = {"ranks, nodes, racks": run.describe_cluster(), "nodes": show_value(run.node_names)}
    for name in ("cores_of_node", "devices_of_node", "memory_bytes"):
        if (array := run.find_array(f"cluster/{name}", 1)) is not None:
            found[name] = show_value(array.tolist())
    if rates is not None and len(rates) > 1:
        links = rates[~np.eye(len(rates), dtype=bool)] / 1e6
        found["links, MB/s"] = f"{links.min():.0f} - {links.max():.0f}"
    return found | {f"source of {key}": text for key, text in run.find_pairs("cluster/source").items()}
