"""The public surface is a list, importing it is light, and what is not installed is named."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

import moetrace
from moetrace import errors

PUBLIC = [
    "__version__",
    "errors",
    "AsyncClient",
    "Client",
    "MoeLayout",
    "RoutingComparison",
    "RoutingTrace",
    "WeightSpan",
    "compare",
    "extreme_token_ratio",
    "kl_k3",
    "layout_of",
    "load",
    "load_file",
    "open_file",
    "record",
    "replay",
    "save",
    "save_file",
    "token_sha256",
]
NEEDS_TORCH = ["layout_of", "record", "replay"]
NEEDS_HTTPX = ["AsyncClient", "Client"]
CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass)]


def run(script: str) -> list[str]:
    """The lines that a script prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_public_names_are_exactly_these() -> None:
    assert sorted(moetrace.__all__) == sorted(PUBLIC)
    assert sorted(dir(moetrace)) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(moetrace, name)
    if name != "__version__":
        assert inspect.getdoc(value)
    if callable(value):
        assert value.__name__ == name


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moetrace' has no attribute 'nonsense'"):
        _ = moetrace.nonsense


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert moetrace.__version__ == version("moetrace")


def test_the_core_imports_neither_torch_nor_transformers_nor_pydantic() -> None:
    core = [name for name in PUBLIC if name not in NEEDS_TORCH + NEEDS_HTTPX]
    lines = run(
        "import sys, moetrace\n"
        "heavy = ('torch', 'transformers', 'pydantic', 'fastapi', 'httpx', 'fsspec', 'pyarrow', 'backports', 'tqdm')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        f"[getattr(moetrace, name) for name in {core!r}]\n"
        "import moetrace.trace, moetrace.comparison, moetrace.format, moetrace.dialects, moetrace.batch\n"
        "import moetrace.codecs, moetrace.stores, moetrace.stores.shared, moetrace.cli\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    assert lines == ["[]", "[]"]


BLOCKERS = {
    "None in sys.modules": "import sys\nsys.modules['torch'] = None\n",
    "not to be found": (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    ),
}


@pytest.mark.parametrize("blocker", BLOCKERS.values(), ids=BLOCKERS)
def test_a_missing_extra_is_named_with_its_pip_command(blocker: str) -> None:
    lines = run(
        blocker + "import moetrace\n"
        "moetrace.save, moetrace.compare\n"  # these work without torch
        f"for name in {NEEDS_TORCH!r}:\n"
        "    try:\n"
        "        getattr(moetrace, name)\n"
        "    except moetrace.errors.MissingExtraError as error:\n"
        "        print(error)\n"
        "        assert isinstance(error, ImportError) and isinstance(error, moetrace.errors.MoetraceError)\n"
        "        assert isinstance(error.__cause__, ModuleNotFoundError)\n"
    )
    assert lines == ["torch is not installed. Run: pip install 'moetrace[transformers]'"] * len(NEEDS_TORCH)


@pytest.mark.parametrize(
    ("module", "use", "message"),
    [
        ("fsspec", "open_store('s3://bucket/x')", "fsspec is not installed. Run: pip install 'moetrace[stores]'"),
        ("httpx", "moetrace.AsyncClient", "httpx is not installed. Run: pip install 'moetrace[client]'"),
        ("pyarrow", "import moetrace.tables", "pyarrow is not installed. Run: pip install 'moetrace[tables]'"),
        (
            "torch",
            "import moetrace.codecs.tensors",
            "torch is not installed. Run: pip install 'moetrace[transformers]'",
        ),
        (
            "backports",
            "moetrace.save([], codec='set+zstd'); codecs.zstd.compress(np.zeros(1, np.uint8))",
            "backports is not installed. Run: pip install 'moetrace[zstd]'",
        ),
    ],
)
def test_what_files_and_stores_need_is_named_when_it_is_needed(module: str, use: str, message: str) -> None:
    if module == "backports" and sys.version_info >= (3, 14):
        pytest.skip("zstd is part of Python")
    lines = run(
        BLOCKERS["not to be found"].replace("'torch'", repr(module)) + "import moetrace, numpy as np\n"
        "from moetrace import codecs\n"
        "from moetrace.stores import open_store\n"
        "try:\n"
        f"    {use}\n"
        "except moetrace.errors.MissingExtraError as error:\n"
        "    print(error)\n"
    )
    assert lines == [message]


# --- errors ---


def documented_tree() -> dict[str, str | None]:
    """Class name to parent name, read off the docstring's drawing."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        drawing = line.removeprefix("    ")
        name = drawing.lstrip("│├└─ ").split(" ")[0]
        if not line.startswith("    ") or not name:
            continue
        depth = (len(drawing) - len(drawing.lstrip("│├└─ "))) // 4
        path = [*path[:depth], name]
        parents[name] = path[depth - 1] if depth else None
    return parents


def test_every_error_is_in_the_documented_tree_under_its_own_parent() -> None:
    assert documented_tree() == {
        cls.__name__: None if cls is errors.MoetraceError else cls.__bases__[0].__name__ for cls in CLASSES
    }


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_a_moetrace_error_with_a_docstring(cls: type[errors.MoetraceError]) -> None:
    assert issubclass(cls, errors.MoetraceError)
    assert cls.__doc__
    assert cls.__name__.endswith("Error")
    with pytest.raises(errors.MoetraceError, match="it broke"):
        raise cls("it broke")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "it broke."),
        ({"expected": 3}, "it broke: expected 3."),
        ({"got": 4}, "it broke: got 4."),
        ({"expected": 3, "got": 4}, "it broke: expected 3, got 4."),
        ({"expected": 3, "got": 4, "fix": "Mend it."}, "it broke: expected 3, got 4. Mend it."),
        ({"fix": "Mend it."}, "it broke. Mend it."),
        ({"expected": 0, "got": ""}, "it broke: expected 0, got ."),
    ],
)
def test_a_message_says_what_expected_got_and_fix(facts: dict, message: str) -> None:
    error = errors.TraceError("it broke", **facts)
    assert str(error) == message
    assert (error.what, error.expected, error.got, error.fix) == (
        "it broke",
        facts.get("expected"),
        facts.get("got"),
        facts.get("fix"),
    )
