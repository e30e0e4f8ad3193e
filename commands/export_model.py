"""The command that writes a run's nets for other programs: export-model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from commands import options
from commands.nets import NetChoice, net_options
from commands.options import FILE

# what is exported is the net itself, whatever this machine would compute it with
_PLAIN = {"device": "cpu", "extract.precision": "fp32", "extract.engine": "torch", "extract.compile": False}


@click.command("export-model")
@net_options
@click.argument("run_name", metavar="[RUN]", required=False)
@click.option("--format", "kind", type=click.Choice(["onnx"]), default="onnx", help="Format of the file.")
@click.option("--out", type=FILE, metavar="FILE", help="File to write. Default: RUN/onnx/RUN.onnx.")
@click.option("--force", is_flag=True, help="Replace a file that is another model.")
def export_model(net: NetChoice, run_name: str | None, kind: str, out: Path | None, force: bool) -> None:
    """Write a run's nets as one ONNX file, for programs without this project.

    The model takes a preprocessed frame and the state after the frame before, and gives the probabilities of phases,
    further label tracks and tools, and the new state. Its metadata have the classes, the preprocessing, the constants
    of the decoding, and hashes. It is checked with ONNX Runtime, frame by frame, and refused if it gives other
    probabilities than torch; the result is written beside it as JSON. examples/run_onnx.py shows how to use it. For
    research only, not a medical device.
    """
    from live.export.model_file import export_model

    if run_name:
        options.refuse("RUN, which is the same", options.given("name"))
        net = replace(net, settings=replace(net.settings, name=run_name))
    with options.watch_signals() as stop:
        path = out or net.run / kind / f"{net.run.name}.{kind}"
        done = export_model(net.load(_PLAIN), path, stop, replace=force)
    click.echo(done.sentence())
