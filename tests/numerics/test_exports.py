"""A room's lazy names are its functions and classes, in whatever order its files are imported."""

import importlib
import pkgutil

import pytest

ROOMS = ("weights", "losses", "features", "gradients", "tuning", "inverse", "numerics")


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_callable_after_every_file_is_imported(room):
    package = importlib.import_module(f"wellposed.{room}")
    files = [info.name for info in pkgutil.iter_modules(package.__path__)]
    for file in files:
        importlib.import_module(f"wellposed.{room}.{file}")
    assert not set(files) & set(package.__all__)  # a file named after its function would take the function's place
    assert all(callable(getattr(package, name)) for name in package.__all__)
