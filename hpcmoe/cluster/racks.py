"""Each node's rack: as the config names it, else the lowest switch or block over the node by Slurm.

Slurm's sources: SLURM_TOPOLOGY_ADDR and its pattern, which slurmd sets for each task (topology_g_get_node_addr), and
`scontrol show topology`, whose lines are those of the plugins topology/tree, block, ring and torus3d.
"""

from __future__ import annotations

import logging
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpcmoe.cluster.names import format_ambiguous, is_same_node, match_names
from hpcmoe.environment import environment_without, read_setting
from hpcmoe.errors import ClusterError

if TYPE_CHECKING:
    from hpcmoe.cluster.discover import RankInfo

log = logging.getLogger(__name__)

SCONTROL_SECONDS = 5  # that its controller may take to answer
_SHORTENS = "SLURM_TOPO_LEN"  # has scontrol cut its lines
_NO_NODES = ("", "(null)", "none", "None")
_NO_SWITCHES = ("", "(null)", "No topology information available")  # lines of scontrol
_UNITS = ("SwitchName", "BlockName", "RingName", "TorusName")  # what has nodes, by plugin
_MAX_HOSTS = 100_000  # of one list
_MAX_NAMED = 8  # nodes in one line
_ONE, _UNKNOWN = "rack0", "unknown"  # the rack of all without Slurm's; of those that Slurm has not
NO_WORD = "no word of racks: one for all"


def find_racks(
    infos_of_node: list[list[RankInfo]], names: Sequence[str], racks: Sequence[str]
) -> tuple[Sequence[str], str]:
    """Return the name of each node's rack: by the config's `racks`, else by Slurm, else one for all; and the source.

    Nodes whose rack Slurm does not have are one rack, "unknown", beside the others; a warning names them.
    """
    if racks:
        if len(racks) != len(names):
            raise ClusterError(f"[cluster] racks has {len(racks)} entries, the run has {len(names)} nodes")
        return racks, "config"

    # The tasks' own addresses cost nothing; Slurm's controller is asked where they do not tell all.
    racks_by_address, is_flat, doubt = read_addresses(infos_of_node, names)
    if is_flat:
        return [_ONE] * len(names), "SLURM_TOPOLOGY_ADDR_PATTERN: no switches"
    if None not in racks_by_address:
        return [rack or _UNKNOWN for rack in racks_by_address], "SLURM_TOPOLOGY_ADDR"
    asked, errors = ask_slurm(infos_of_node, names)
    known = [asked.get(name, rack) for name, rack in zip(names, racks_by_address, strict=True)]

    # Use what is known, and warn of the nodes of which nothing is.
    missing = [name for name, rack in zip(names, known, strict=True) if rack is None]
    errors = [doubt, *errors] if doubt else errors
    why = f" ({'; '.join(errors)})" if errors else ""
    if len(missing) == len(names):
        if errors:
            log.warning("Slurm tells no rack of %s%s: all are taken as one", list_some(missing), why)
        return [_ONE] * len(names), NO_WORD
    if missing:
        log.warning('Slurm tells no rack of %s%s: "%s" stands for it', list_some(missing), why, _UNKNOWN)
    elif errors:
        log.info("racks%s: scontrol tells all of this run's nodes", why)
    by_address = any(rack is not None and name not in asked for name, rack in zip(names, racks_by_address, strict=True))
    sources = ["scontrol show topology"] * bool(asked) + ["SLURM_TOPOLOGY_ADDR"] * by_address
    return [rack or _UNKNOWN for rack in known], ", ".join(sources)


def list_some(names: Sequence[str]) -> str:
    """Format the first few names, and how many others there are."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def read_addresses(infos_of_node: list[list[RankInfo]], names: Sequence[str]) -> tuple[Sequence[str | None], bool, str]:
    """Read the racks in the tasks' addresses -> (racks [nodes], None where unknown; is Slurm flat?; what is wrong).

    Where addresses contradict each other none is believed: a launcher has handed them on from where the job began.
    """
    # All ranks of a node have one address; the pattern is the whole cluster's, so rank 0's will do for a rank without.
    unknown = [None] * len(names)
    pattern = read_setting("SLURM_TOPOLOGY_ADDR_PATTERN")
    seen = [{(info.address, info.address_pattern or pattern) for info in group} for group in infos_of_node]
    several = [name for name, of_node in zip(names, seen, strict=True) if len(of_node) > 1]
    if several:
        return unknown, False, f"ranks of {list_some(several)} have different SLURM_TOPOLOGY_ADDR"
    given = [of_node.pop() for of_node in seen]

    # Each node has an address of its own; in a flat Slurm it is the node's name.
    shared = shared_by(given, names)
    if all(address and pattern == "node" for address, pattern in given):
        return unknown, not shared, ""
    if shared:
        return unknown, False, f"SLURM_TOPOLOGY_ADDR of {list_some(shared)} is another node's"
    own = [group[0].name for group in infos_of_node]
    split = [split_address(*address, name) for address, name in zip(given, own, strict=True)]
    racks = [rack for rack, _ in split]
    absent = [name for name, rack in zip(names, racks, strict=True) if rack is None]

    # Nodes' names alone are no word of racks; an address that has lost its switches is.
    is_broken = any(rack is None and node != address for (rack, node), (address, _) in zip(split, given, strict=True))
    is_doubtful = is_broken or 0 < len(absent) < len(names)
    return racks, False, f"no switch in SLURM_TOPOLOGY_ADDR of {list_some(absent)}" if is_doubtful else ""


def shared_by(given: list[tuple[str, str]], names: Sequence[str]) -> list[str]:
    """Return the nodes whose address, given with its pattern, is also another's, or names another node of the run."""
    uses = Counter(address for address, _ in given if address)
    named = [split_address(*address, name)[1] or name for address, name in zip(given, names, strict=True)]
    found, _ = match_names(named, names)
    return [
        name
        for (address, _), node, name in zip(given, named, names, strict=True)
        if uses[address] > 1 or found.get(node, name) != name
    ]


def split_address(address: str, pattern: str, name: str) -> tuple[str | None, str]:
    """Split the address of the node `name` -> (its lowest switch or block, or None; the node that it names).

    By the pattern so many labels are switches; without it they end where the name begins, else at the last label.
    Of a label as ring:position the first part is what others share.
    """
    labels = re.split(r"\.(?![^\[]*\])", address)  # a list in brackets is one label, whatever dots it has
    *switches, node = pattern.split(".")
    if node == "node" and switches != [""]:
        at = len(switches)
    else:
        tails = [".".join(labels[at:]) for at in range(len(labels))]
        whole = [at for at, tail in enumerate(tails) if tail == name]
        at = (whole or [at for at, tail in enumerate(tails) if is_same_node(tail, name)] or [len(labels) - 1])[0]
    rack = labels[at - 1] if 0 < at < len(labels) else None
    if rack and switches and ":" in switches[-1]:
        rack = rack.partition(":")[0]
    return rack or None, ".".join(labels[at:])


def ask_slurm(infos_of_node: list[list[RankInfo]], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Query Slurm's controller, within a job, for the nodes' racks -> (rack by name, what is wrong)."""
    if not read_setting("SLURM_JOB_ID"):
        return {}, []

    # Read the switches, and match their hosts to the nodes.
    try:
        lines = show_topology()
        rack_of_host, errors = read_switches(lines)
    except ClusterError as error:
        return {}, [str(error)]
    found, ambiguous = match_names((group[0].name for group in infos_of_node), rack_of_host)
    if ambiguous:
        errors.append(format_ambiguous(ambiguous))

    # Name the nodes that no switch is over.
    own = {name: group[0].name for name, group in zip(names, infos_of_node, strict=True)}
    racks = {name: rack_of_host[found[host]] for name, host in own.items() if host in found}
    absent = [name for name, host in own.items() if host not in found | ambiguous]
    if absent and any(line.strip() not in _NO_SWITCHES for line in lines):
        errors.append(f"scontrol show topology has no switch over {list_some(absent)}")
    return racks, errors


def show_topology() -> list[str]:
    """Read the lines of `scontrol show topology`; ClusterError where it does not answer."""
    # Run scontrol, for lines that are not cut.
    command = ["scontrol", "show", "topology"]
    environ = environment_without(_SHORTENS)
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environ,
            timeout=SCONTROL_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{' '.join(command)} has not answered in {SCONTROL_SECONDS} s") from None
    except OSError as error:
        raise ClusterError(f"{' '.join(command)} cannot be run: {error.strerror}") from None

    # Raise the last line of its errors.
    if ended.returncode != 0:
        last_line = (ended.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise ClusterError(f"{' '.join(command)} ends with status {ended.returncode}: {last_line}")
    return ended.stdout.splitlines()


def read_switches(lines: list[str]) -> tuple[dict[str, str], list[str]]:
    """Read lines of `scontrol show topology` -> (the lowest switch or block over each host, what is wrong).

    Switches of a higher level, and blocks of blocks, list again what is below them.
    """
    rack_of_host: dict[str, str] = {}
    errors = []
    for line in lines:
        # Skip what is above the lowest switches.
        fields = dict(word.partition("=")[::2] for word in line.split())
        name = next((fields[unit] for unit in _UNITS if fields.get(unit)), "")
        is_lowest = fields["Level"] == "0" if fields.get("Level") else "Switches" not in fields
        nodes = fields.get("Nodes", "")
        if not name or not is_lowest or nodes in _NO_NODES:
            continue

        # The first switch over a host counts.
        hosts, unread = expand_hosts(nodes)
        for host in hosts:
            rack_of_host.setdefault(host, name)
        if unread:
            errors.append(f"scontrol show topology: {name} has Nodes={nodes[:60]}, of which {unread[:60]} is no list")
    return rack_of_host, errors


def expand_hosts(text: str) -> tuple[list[str], str]:
    """Expand a list of hosts as Slurm writes it, n[01-03,7]-ib[0-1],m -> (hosts, what cannot be read of it)."""
    cut = re.search(r"(?:^|,)[^,\[\]]*\[[^\]]*$", text)  # an entry that ends within brackets
    whole = text[: cut.start()] if cut else text
    hosts: list[str] = []
    unread: list[str] = []
    for entry in re.split(r",(?![^\[]*\])", whole) if whole else []:
        try:
            hosts += expand_entry(entry, _MAX_HOSTS - len(hosts))
        except ValueError:
            unread.append(entry)
    return hosts, ",".join([*unread, cut[0].removeprefix(",")] if cut else unread)


def balanced(text: str) -> bool:
    """Return True if each bracket is closed before the next opens."""
    return re.sub(r"[^\[\]]", "", text).replace("[]", "") == ""


def expand_entry(entry: str, most: int) -> list[str]:
    """Expand one entry of a list of hosts -> its names; ValueError where it is none, or stands for too many."""
    made = [""]
    for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", entry):
        ends = [plain] if plain else expand_ranges(ranges, most)
        if len(made) * len(ends) > most:
            raise ValueError(entry)
        made = [f"{start}{end}" for start in made for end in ends]
    if made == [""] or not balanced(entry):
        raise ValueError(entry)
    return made


def expand_ranges(text: str, most: int) -> list[str]:
    """Expand 01-03,7 -> 01, 02, 03, 7; ValueError where it is no list of ranges, or stands for too many."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        if match is None:
            raise ValueError(text)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first + len(numbers) >= most:
            raise ValueError(text)
        numbers += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return numbers
