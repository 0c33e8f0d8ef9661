"""The public API: its exports, and that both clients are the same."""

import ast
import importlib.util
import inspect
import pickle
from pathlib import Path

import pytest
import vit_client
from vit_client import AsyncClient, BadImage, BadImages, Client, errors

CLIENT = Path(__file__).parents[2] / "client"


def test_all_is_what_there_is() -> None:
    public = {
        name
        for name, value in vars(vit_client).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(vit_client.__all__) == public | {"__version__"}
    assert set(errors.__all__) <= set(vit_client.__all__)


def test_what_is_exported_is_documented() -> None:
    for name in vit_client.__all__:
        thing = getattr(vit_client, name)
        if inspect.isclass(thing):
            assert thing.__doc__, name
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                if not method.startswith("_"):
                    assert function.__doc__, f"{name}.{method}"


def test_the_generated_client_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_sync", CLIENT / "tools" / "make_sync.py")
    assert spec is not None
    assert spec.loader is not None
    make_sync = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_sync)
    written = (CLIENT / "vit_client" / "_sync.py").read_text()
    assert ast.dump(ast.parse(written)) == ast.dump(ast.parse(make_sync.generate())), (
        "run: python client/tools/make_sync.py"
    )


def public_methods(kind: type) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("_") or name == "__init__"
    }


def test_both_clients_have_the_same_methods() -> None:
    """Compares the classes, not the generator's output."""
    ours, theirs = public_methods(Client), public_methods(AsyncClient)
    assert ours.keys() == theirs.keys()
    for name, method in ours.items():
        twin = theirs[name]
        assert callable(method)
        assert callable(twin)
        assert inspect.getdoc(method) == inspect.getdoc(twin), name
        parameters = inspect.signature(method).parameters
        assert parameters == inspect.signature(twin).parameters, name


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    documented = [
        line.lstrip(" │├└─").split()[0]
        for line in (errors.__doc__ or "").splitlines()
        if line.startswith("    ")
    ]
    assert sorted(documented) == sorted(errors.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.VitClientError)


def test_errors_survive_pickling() -> None:
    """So that a worker process can pass them to its parent."""
    first = BadImage("is empty", index=3, name="a.jpg", task="embed", details="words")
    for error in (first, BadImages([first, first], [None, None, 1]), errors.Overloaded("full")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert str(copy) == str(error)
        assert copy.__dict__.keys() == error.__dict__.keys()
    assert pickle.loads(pickle.dumps(first)).reason == "is empty"


def test_errors_are_the_builtin_ones_too() -> None:
    with pytest.raises(ValueError, match="HTTP address"):
        Client("http://localhost:8000")
    assert issubclass(errors.DeadlineExceeded, TimeoutError)
