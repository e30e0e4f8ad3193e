"""An installed copy has all packages: those of setup.cfg are the folders with modules in the checkout."""

from __future__ import annotations

import configparser
from pathlib import Path

from setuptools import find_packages

PROJECT = Path(__file__).resolve().parent.parent
NOT_INSTALLED = ("benchmarks", "docs", "examples", "tests")


def test_every_folder_with_modules_is_a_package_that_is_installed() -> None:
    settings = configparser.ConfigParser()
    settings.read(PROJECT / "setup.cfg")
    assert settings["options"]["packages"] == "find:"
    include = [one.strip() for one in settings["options.packages.find"]["include"].split(",")]
    tops = {one.split(".")[0] for one in find_packages(str(PROJECT), exclude=[f"{name}*" for name in NOT_INSTALLED])}
    folders = {path.parent.relative_to(PROJECT) for top in tops for path in (PROJECT / top).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(find_packages(str(PROJECT), include=include))
