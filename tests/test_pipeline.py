"""`pipeline.py` itself: commands are imported when they are needed, and the help lists them without importing them."""

from __future__ import annotations

import ast
import sys

import click
import pytest

import pipeline
from commands.options import SHARED_STAGES, STAGES
from tests.cli import PROJECT


@pytest.mark.parametrize("name", pipeline.COMMANDS)
def test_the_list_of_commands_equals_their_own_help(name: str) -> None:
    command = pipeline.cli.get_command(click.Context(pipeline.cli), name)
    assert command is not None
    assert command.name == name
    assert command.get_short_help_str(limit=1000).rstrip(".") == pipeline.COMMANDS[name][1]


def test_an_unknown_command_is_none() -> None:
    assert pipeline.cli.get_command(click.Context(pipeline.cli), "nonsense") is None


def test_stages_are_commands_and_those_with_devices_can_be_shared() -> None:
    context = click.Context(pipeline.cli)
    for name in pipeline.COMMANDS:
        command = pipeline.cli.get_command(context, name)
        assert command is not None
        assert any(parameter.name == "devices" for parameter in command.params) == (name in SHARED_STAGES)
    assert set(STAGES) <= pipeline.COMMANDS.keys()


def test_nothing_but_click_and_the_settings_of_threads_is_imported_at_the_top() -> None:
    tree = ast.parse((PROJECT / "pipeline.py").read_text())
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names} == {"click", "configs"}
