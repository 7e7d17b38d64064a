"""Nodes found by name: a name with a domain and the same name without it are one node, where only one can be meant."""

from collections import defaultdict
from collections.abc import Iterable


def match_names(wanted: Iterable[str], known: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Match each wanted name to a known one -> (known by wanted, the several that it may be by wanted).

    n1 and n1.cluster.local are the same node; n1.a and n1.b are two, and n1 beside these may be either: no match.
    """
    wanted, known = list(dict.fromkeys(wanted)), list(dict.fromkeys(known))
    found = {name: name for name in set(wanted) & set(known)}

    # What is named exactly is taken; the rest may differ by a domain.
    longer = defaultdict(list)
    for name in known:
        for start in () if name in found else starts_of(name):
            longer[start].append(name)
    left = set(known) - set(found)
    candidates = {
        name: longer[name] + [start for start in starts_of(name) if start != name and start in left]
        for name in wanted
        if name not in found
    }

    # A match must be the only one, seen from either side.
    claims = defaultdict(list)
    for name, others in candidates.items():
        for other in others:
            claims[other].append(name)
    ambiguous = {}
    for name, others in candidates.items():
        if len(others) == 1 and len(claims[others[0]]) == 1:
            found[name] = others[0]
        elif others:
            ambiguous[name] = others
    return found, ambiguous


def is_same_node(name: str, other: str) -> bool:
    """Return True if two names differ by a domain at most."""
    return name in starts_of(other) or other in starts_of(name)


def starts_of(name: str) -> list[str]:
    """Return a name with ever more of its domain: n1, n1.cluster, n1.cluster.local; an address of digits is whole."""
    labels = name.split(".")
    if all(label.isdigit() for label in labels):
        return [name]
    return [".".join(labels[:count]) for count in range(1, len(labels) + 1)]


def format_ambiguous(ambiguous: dict[str, list[str]]) -> str:
    """Format which names may be of several nodes, one clause each."""
    return "; ".join(f"{name} may be {' or '.join(others)}" for name, others in ambiguous.items())
