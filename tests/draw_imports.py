"""Draw which chapter of hpcmoe imports which, as a matrix in the terminal: `python tests/draw_imports.py`.

Chapters stand in the story's order, the importing one by row. A dot is an arrow downward, to an earlier chapter; `^` is
one upward, `o` a part of a circle. With either it exits with status 1.
"""

import sys

from test_floors import FILES, FLOOR_OF_CHAPTER, chapter_of, imports_of

NO_CHAPTERS = {"__init__"}  # the package's own docstring and names


def read_graph(files=FILES):
    """Read the chapters that each chapter imports -> dict chapter: set of others, in the story's order."""
    graph = {chapter: set() for chapter in FLOOR_OF_CHAPTER}
    for file in files:
        names = {module.split(".")[1] for module in imports_of(file) if module.startswith("hpcmoe.")}
        if chapter_of(file) not in NO_CHAPTERS:
            graph.setdefault(chapter_of(file), set()).update(names - {chapter_of(file)})
    return {chapter: others for chapter, others in graph.items() if others or is_imported(chapter, graph)}


def is_imported(chapter, graph):
    """Return True if any chapter imports this one."""
    return any(chapter in others for others in graph.values())


def find_reachable(graph, start):
    """Find the chapters that one imports, itself or through others -> set."""
    reached, ahead = set(), [start]
    while ahead:
        for other in graph.get(ahead.pop(), ()):
            if other not in reached:
                reached.add(other)
                ahead.append(other)
    return reached


def find_marks(graph):
    """Find the mark of each arrow -> dict (importing, imported): ".", "^" or "o"."""
    order = {chapter: place for place, chapter in enumerate(graph)}
    reachable = {chapter: find_reachable(graph, chapter) for chapter in graph}
    marks = {}
    for chapter, others in graph.items():
        for other in others:
            is_upward = order.get(other, len(order)) > order[chapter]
            marks[chapter, other] = "o" if chapter in reachable.get(other, ()) else "^" if is_upward else "."
    return marks


def draw(graph, marks):
    """Draw the graph as a matrix -> text; the columns are numbered as the rows are."""
    width = max(map(len, graph))
    lines = [" " * (width + 4) + " ".join(f"{column:2}" for column in range(len(graph)))]
    for row, chapter in enumerate(graph):
        cells = ((marks.get((chapter, other), " ") if other != chapter else "\\") for other in graph)
        lines.append(f"{row:2} {chapter:{width}} " + " ".join(f"{cell:>2}" for cell in cells).rstrip())
    return "\n".join(lines)


def main():
    """Draw the graph, and name what is wrong in it -> exit status."""
    graph = read_graph()
    marks = find_marks(graph)
    wrong = [f"{mark} {one} imports {other}" for (one, other), mark in marks.items() if mark != "."]
    print(draw(graph, marks), *sorted(wrong), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
