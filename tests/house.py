"""The house rules of names, docstrings and types, listed where they are broken: `python tests/house.py [PATH ...]`.

Without a path it looks at hpcmoe/ in the current folder; with some it lists what concerns the files below them.
"""

import ast
import collections
import pathlib
import re
import sys

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SAME_IN_MANY = {"main", "log"}  # entry points and loggers

# The first words of functions' docstrings: plain imperatives.
IMPERATIVES = """
    Abort Accumulate Acquire Add Advance Allocate Announce Append Apply Assign Attach Average Balance Bind Bound
    Broadcast Build Call Callback: Cast Check Choose Clear Clip Close Collect Combine Compare Compile Compute
    Concatenate Configure Consume Convert Copy Count Create Cut Decide Decode Delete Derive Describe Detect
    Discard Dispatch Distribute Divide Draw Drop Encode End Ensure Enter Escape Estimate Evaluate Exchange Exclude
    Exit Expand Export Extend Extract Fetch Fill Filter Find Finish Fit Fix Flatten Flush Fold Follow Format
    Forward Free Gather Generate Group Grow Hash Hide Hold Ignore Import Index Initialize Insert Install
    Interleave Iterate Join Keep Launch Limit List Load Lock Log Lower Make Map Mark Mask Match Measure Merge
    Migrate Move Multiply Name Normalize Open Order Pack Pad Pair Parse Pass Pause Permute Pick Pin Place Plan
    Plot Poke Poll Pop Post Predict Prepare Price Print Probe Process Prove Prune Publish Push Query Queue Raise
    Rank Read Rebalance Rebuild Receive Record Redirect Reduce Refine Refresh Register Reject Relabel Release
    Relocate Remove Rename Renew Reorder Repeat Replace Replicate Report Request Reset Reshape Resize Resolve
    Restore Restrict Return Reuse Reverse Round Route Run Sample Save Scale Scatter Search Select Send Set Shape
    Share Show Shuffle Simulate Sleep Solve Sort Split Start Step Stop Store Submit Subtract Sum Summarize Swap
    Switch Synchronize Test Time Trace Track Trade Train Transfer Transpose Trim Truncate Try Undo Unpack Update
    Use Validate Verify Wait Warn Watch Wrap Write Yield Zero
"""
PREDICATES = ("is_", "has_", "may_", "can_")
PREDICATE_BEGINNING = "Return True if"

# Words of the first edition's dialect, which no name may bear again; a file's own exceptions are terms of its field.
DIALECT = """
    slope slopes flight flights berth berths parcel parcels guest guests hall halls landing landings mate mates
    slip slips board boards news ticket tickets leg legs carrier carriers lay laid arrange census gauge gauges
    pace room ways facts reckon lacks misfit misfits fault faults refuse refused tell told say said hear errand
    errands patience hole holes seat seats sight sights verdict judge weigh weighed resettle adopt adopted shifts
"""
TERMS_OF = {"hpcmoe/cluster/measure/pairs.py": {"slope"}}  # of a straight line


def parse(root):
    """Parse the package's files -> {path in the repository: tree}."""
    files = sorted((root / "hpcmoe").rglob("*.py"))
    return {str(file.relative_to(root)): ast.parse(file.read_text()) for file in files}


def list_public_names(tree):
    """List the public functions, classes and constants of a module, each with its line."""
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names = [name]
            case ast.Assign(targets=targets):
                names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                names = [name]
            case _:
                names = []
        yield from ((name, node.lineno) for name in names if not name.startswith("_"))


def find_repeated_names(trees):
    """List the public names that several modules define."""
    places_of_name = collections.defaultdict(list)
    for path, tree in trees.items():
        for name, line in dict(list_public_names(tree)).items():
            places_of_name[name].append(f"{path}:{line}")
    for name, places in sorted(places_of_name.items()):
        if len(places) > 1 and name not in SAME_IN_MANY:
            yield from (f"{place}: {name} is defined in {len(places)} modules" for place in places)


def find_register(trees):
    """List the docstrings that begin by another word than a plain imperative."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(node):
                text = ast.get_docstring(node)
                if not is_in_register(node, text):
                    yield f"{path}:{node.lineno}: {node.name}: {text.splitlines()[0][:60]}"


def is_in_register(node, text):
    """Return True if a docstring begins as it should; a class is a noun, __init__ describes its arguments."""
    first = text.split()[0].rstrip(",.")
    if isinstance(node, ast.ClassDef) or node.name == "__init__":
        return first != "Whether"
    if node.name.startswith(PREDICATES) and first == "Return":
        return text.startswith(PREDICATE_BEGINNING)
    return first in IMPERATIVES.split()


def find_dialect(trees):
    """List the names that hold a word of the old dialect."""
    for path, tree in trees.items():
        for name, line in list_defined(tree):
            words = re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower().replace("in_flight", "")
            if found := set(words.split("_")) & set(DIALECT.split()) - TERMS_OF.get(path, set()):
                yield f"{path}:{line}: {name}: {', '.join(sorted(found))}"


def list_defined(tree):
    """List the functions, classes, arguments, variables and attributes that a module defines, each with its line."""
    defined = {}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.setdefault(name, node.lineno)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                defined.setdefault(name, node.lineno)
    return defined.items()


def find_missing_annotations(trees):
    """List the public functions and methods with an argument or a result that has no type."""
    for path, tree in trees.items():
        for owner, function in list_public_functions(tree):
            arguments = function.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            if owner and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list):
                named = named[1:]
            named += [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
            missing = [argument.arg for argument in named if argument.annotation is None]
            if function.returns is None and function.name != "__init__":
                missing.append("return")
            if missing:
                yield f"{path}:{function.lineno}: {owner}{function.name}: no type of {', '.join(missing)}"


def list_public_functions(tree):
    """List a module's public functions, and the methods of its public classes -> (class and dot or nothing, node)."""
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield "", node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [method for method in node.body if isinstance(method, FUNCTIONS)]
            yield from ((f"{node.name}.", m) for m in methods if m.name == "__init__" or not m.name.startswith("_"))


RULES = {
    "one public name, one thing": find_repeated_names,
    "docstrings begin with a plain imperative": find_register,
    "no word of the old dialect": find_dialect,
    "public functions are annotated": find_missing_annotations,
}


def main(*paths):
    """Print what breaks the rules in the files below some paths -> exit status."""
    trees = parse(pathlib.Path.cwd())
    broken = 0
    for rule, find in RULES.items():
        found = [line for line in find(trees) if not paths or line.startswith(paths)]
        print(f"== {rule}: {len(found)}", *found, sep="\n")
        broken += len(found)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(*(path.removeprefix("./") for path in sys.argv[1:])))
