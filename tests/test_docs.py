"""Every public name is documented, what the pages link to is there, and what they show runs."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import textwrap
import types

import pytest
import torch
from table import TABLE

import biofunc as bf
from biofunc.rule import INJECTED

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))

MODULES = (
    bf,
    *[getattr(bf, name) for name in ("distributions", "ensemble", "measure", "plot", "random", "schedules")],
    *[importlib.import_module(f"biofunc.{name}") for name in ("studies.l2_init", "studies.shrink_and_perturb")],
    importlib.import_module("biofunc.statistics"),
)
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
FUNCTIONS = {path: thing for path, thing in PUBLIC.items() if inspect.isfunction(thing)}
CLASSES = {path: thing for path, thing in PUBLIC.items() if getattr(thing, "__module__", "").startswith("biofunc")}
CLASSES = {path: thing for path, thing in CLASSES.items() if inspect.isclass(thing)}
METHODS = {
    f"{path}.{name}": member
    for path, cls in CLASSES.items()
    for name, member in vars(cls).items()
    if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_"))
}
RULES = {path: function for path, function in FUNCTIONS.items() if hasattr(function, "rule")}
MAKERS = {f"biofunc.{name}": getattr(bf, name) for name in TABLE if f"biofunc.{name}" not in RULES}

HEADS = ("Args", "Attributes", "Returns", "Raises", "Phase", "Noise", "Source", "Differs")
"""The sections of a docstring, in their order."""


NEVER = {"biofunc.distributions.gamma": {"ValueError"}, "biofunc.distributions.beta": {"ValueError"}}
"""Errors in the code below a function that cannot come up: concentrations are tensors there, which are not checked."""


def each(things):
    return pytest.mark.parametrize("thing", things.values(), ids=things.keys())


def sections(thing):
    """What a docstring says, by head; what stands before the first head is under ""."""
    found, head = {"": []}, ""
    for line in inspect.getdoc(thing).splitlines():
        match = re.match(rf"({'|'.join(HEADS)}):(?: (.*))?$", line)
        if match:
            head, line = match[1], match[2] or ""
            assert head not in found, f"{head} stands twice"
            found[head] = []
        found[head].append(line)
    return {head: "\n".join(lines).strip("\n") for head, lines in found.items()}


def entries(section):
    """What a list of arguments or attributes says, by name."""
    before, *parts = re.split(r"^    (\w+):\s", section, flags=re.MULTILINE)
    assert not before, f"no name: {before}"
    return dict(zip(parts[::2], parts[1::2], strict=True))


def raised_by(function, seen):
    """Names of the errors that a function raises, alone or through the functions of biofunc that it calls."""
    function = inspect.unwrap(function)
    if function in seen:
        return set()
    seen.add(function)
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            names.add(ast.unparse(node.exc.func).rpartition(".")[2])
        if isinstance(node, ast.Call):
            called = resolved(node.func, function)
            if isinstance(called, types.FunctionType) and called.__module__.startswith("biofunc"):
                names |= raised_by(called, seen)
    return names


def resolved(node, function):
    """What a name or a dotted name in a function stands for, if it is global."""
    if isinstance(node, ast.Name):
        return function.__globals__.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(resolved(node.value, function), node.attr, None)
    return None


@pytest.mark.parametrize("module", MODULES, ids=[module.__name__ for module in MODULES])
def test_public_modules_say_what_they_are(module):
    assert re.match(r".+[.:]$", module.__doc__.splitlines()[0])


@each(FUNCTIONS | CLASSES | METHODS)
def test_docstrings_begin_with_one_line_and_keep_their_order(thing):
    assert thing.__doc__
    found = sections(thing)
    summary, *rest = found[""].splitlines()
    assert re.match(r"[A-Z].*[.:`]$", summary), summary
    assert not rest or not rest[0], "the first line is a paragraph of its own"
    assert list(found)[1:] == [head for head in HEADS if head in found]
    assert all(found.values())


@each(FUNCTIONS | METHODS)
def test_args_name_the_parameters(thing):
    parameters = [name for name in inspect.signature(thing).parameters if name != "self"]
    assert list(entries(sections(thing).get("Args", ""))) == parameters


@each(FUNCTIONS | METHODS)
def test_results_are_described(thing):
    assert ("Returns" in sections(thing)) == (inspect.signature(thing).return_annotation is not None)


@pytest.mark.parametrize("path", FUNCTIONS | METHODS)
def test_errors_are_named(path):
    thing = (FUNCTIONS | METHODS)[path]
    raised = raised_by(thing, set()) | ({"ValueError", "TypeError"} if path in RULES else set())
    named = set(re.findall(r"\b[A-Z]\w+Error\b", sections(thing).get("Raises", "")))
    assert raised - NEVER.get(path, set()) <= named, f"{raised} are raised, {named} named"


@each(CLASSES)
def test_attributes_name_the_fields(thing):
    described = entries(sections(thing)["Attributes"])
    if dataclasses.is_dataclass(thing):
        assert list(described) == [field.name for field in dataclasses.fields(thing)]
    properties = {name: member for name, member in vars(thing).items() if isinstance(member, property)}
    assert all(member.__doc__ for member in properties.values())


@each(RULES | MAKERS)
def test_rules_say_where_they_stand_and_whence_they_come(thing):
    rule = thing.rule if thing in RULES.values() else TABLE[thing.__name__].make()
    found = sections(thing)
    assert re.match(rf"{rule.phase}\b", found["Phase"])
    assert re.search(r"\d{4}|pytorch_bio_transformations|as for `", found["Source"])
    assert found["Differs"]


@each(RULES)
def test_rules_that_draw_say_what(thing):
    at_init = thing.rule.initialise.args[1] if thing.rule.initialise else ()
    assert ("Noise" in sections(thing)) == (thing.rule.draws or "noise" in at_init)


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_rules_say_how_they_are_turned_off(row):
    text = inspect.getdoc(getattr(bf, row.given))
    if row.off is None:
        assert re.search("idempotent|Phase: optimizer", text)
        return
    args = entries(sections(getattr(bf, row.given))["Args"])
    described = " ".join([args[name] for name in row.off])
    assert re.search(r"\boff\b|: none|moves nothing|draws none", described, re.IGNORECASE)
    assert all([re.search(rf"\b{value:g}\b", described) for value in row.off.values()])


def test_the_rules_of_the_studies_say_how_they_are_turned_off():
    for path in [path for path in RULES if ".studies." in path]:
        assert "turns the rule off" in sections(RULES[path])["Args"], path


def test_mechanisms_that_are_no_rules_have_sources():
    for thing in (bf.split_synapses, bf.l1_penalty, bf.convert):
        assert {"Source", "Differs"} <= sections(thing).keys(), thing
    assert "1 turns the" in entries(sections(bf.split_synapses)["Args"])["gamma"]


def test_pages_of_the_reference_exist_and_show_every_rule():
    (listed,) = re.findall(r"addprefix biofunc\.,([^)]*)\)", (ROOT / "Makefile").read_text())
    pages = ["biofunc", *[f"biofunc.{name}" for name in listed.replace("\\", "").split()]]
    shown = [importlib.import_module(name) for name in pages]
    assert {module.__name__ for module in MODULES} <= set(pages)
    mechanisms = {rule.__module__ for rule in RULES.values()} | {bf.split_synapses.__module__}
    assert mechanisms <= set(pages)
    assert all(module.__doc__ and module.__all__ for module in shown)


def test_constants_are_explained():
    homes = {"biofunc.Hyperparameter": "biofunc.rule", "biofunc.plot.COLOURS": "biofunc.plot"}
    assert homes.keys() == PUBLIC.keys() - FUNCTIONS.keys() - CLASSES.keys()
    for path, home in homes.items():
        body = ast.parse(inspect.getsource(importlib.import_module(home))).body
        name = path.rpartition(".")[2]
        place = [re.match(rf"{name}\b", ast.unparse(node)) is not None for node in body].index(True)
        assert re.match("['\"]", ast.unparse(body[place + 1])), path


def test_rules_look_like_functions():
    """What help(), editors and pdoc show of a decorated function."""
    for path, rule in RULES.items():
        assert rule.__name__ == path.rpartition(".")[2]
        names = list(inspect.signature(rule).parameters)
        assert names[:3] == ["params", "grads", "state"]
        assert not set(names) & set(INJECTED)


def without_code(page):
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page):
    """The anchors of a page, as GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        file, _, anchor = target.partition("#")
        if re.match(r"https?:", file):
            continue
        goal = page.parent / file if file else page
        assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), target


def test_names_that_texts_mention_exist():
    seen = 0
    for text in [*PAGES, *sorted((ROOT / "biofunc").rglob("*.py")), *sorted((ROOT / "notebooks").glob("*.py"))]:
        for dotted in re.findall(r"(?<![\w.])bf((?:\.[A-Za-z]\w*)+)", text.read_text()):
            thing = bf
            for name in dotted[1:].split("."):
                thing = getattr(thing, name, None)
                assert thing is not None, f"{text.name}: bf{dotted}"
            seen += 1
    assert seen > 100


GOTCHAS = (ROOT / "docs" / "gotchas.md").read_text().split("\n## ")


@pytest.mark.parametrize("entry", GOTCHAS[1:], ids=[entry.splitlines()[0] for entry in GOTCHAS[1:]])
def test_gotchas_are_as_they_say(entry, fresh_compiler, capsys):
    for part in ("**Symptom.** ", "**Why.** ", "**What to do.** "):
        assert entry.count(f"\n{part}") == 1, part
    (imports,) = re.findall(r"```python\n(.*?)```", GOTCHAS[0], re.DOTALL)
    (snippet,) = re.findall(r"```python\n(.*?)```", entry, re.DOTALL)
    if "FSDP" in entry.splitlines()[0] and torch.__version__ < (2, 13):
        pytest.skip("torch 2.11 raises in a group of one process, where 2.13 gives wrong numbers")
    with torch.random.fork_rng():
        exec(imports + snippet, {})  # the page is our own text


def test_all_gotchas_are_listed():
    listed = re.findall(r"\(#([\w-]+)\)", GOTCHAS[0])
    assert listed == anchors(ROOT / "docs" / "gotchas.md")[1:]
