"""The documentation: its code runs as it stands, every public name is described, and importing stays light."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import paradigms

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(info.name for info in pkgutil.walk_packages(paradigms.__path__, "paradigms."))
HEAVY = ("tensorflow", "tensorflow_datasets", "matplotlib")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    """A page's Python blocks, in order and in one namespace, in an empty folder."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    blocks = list(BLOCK.finditer(text))
    if not blocks:
        pytest.skip(f"{page.name} has no Python code")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))  # so that a traceback names the line of the page
        exec(compile("\n" * above + block[1], str(page), "exec"), namespace)


def public(module):
    """The functions and classes that `module` defines, and their methods, by dotted name."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield name, value
            methods = ((key, inspect.unwrap(inspect.getattr_static(value, key))) for key in vars(value))
            methods = ((key, getattr(method, "__func__", method)) for key, method in methods)
            yield from ((f"{name}.{key}", m) for key, m in methods if key[0] != "_" and inspect.isfunction(m))
        elif callable(value) and inspect.isfunction(inspect.unwrap(value)):
            yield name, inspect.unwrap(value)


def described(thing):
    """Its own docstring; what Python makes up for tuples and dataclasses is none."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return text and not text.startswith(f"{thing.__name__}(")


def arguments(text):
    """The names under "Args:" of a docstring."""
    section = re.search(r"^Args:\n((?:[ ]{2,}.*\n|\n)*)", inspect.cleandoc(text) + "\n", re.MULTILINE)
    for entry in re.findall(r"^  (\S[^:(]*)", section[1] if section else "", re.MULTILINE):
        yield from (name.strip(" *`") for name in entry.split(","))


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_described(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for thing_name, thing in public(module):
        assert described(thing), f"{name}.{thing_name} has no docstring"
        named = set(arguments(thing.__doc__))
        takes = vars(thing).get("__init__", thing) if inspect.isclass(thing) else thing  # Flax hides it behind (*args)
        unknown = named and named - set(inspect.signature(takes).parameters)
        assert not unknown, f'{name}.{thing_name}: "Args:" names {sorted(unknown)}, which it does not take'


def test_every_module_is_in_the_reference():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    assert {name for name in MODULES if name.count(".") == 1} == listed


def test_importing_is_light():
    code = f"import sys, paradigms; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
