"""The command `submit`, which runs another command as a Slurm job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands import options
from commands.options import Settings
from commands.train import shard_of_process
from configs.errors import UserError

PROGRAM = Path(__file__).resolve().parent.parent / "pipeline.py"


@click.command()
@click.argument("stage", metavar="STAGE", type=click.Choice(options.STAGES))
@click.argument("arguments", metavar="-- [OPTIONS OF THE STAGE]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--partition", metavar="P", help="Partition of the job. Default: the cluster's.")
@click.option("--gpus-per-node", type=click.IntRange(1), metavar="N", help="One process per GPU if N is above 1.")
@click.option("--nodes", type=click.IntRange(1), default=1, metavar="N", help="Number of nodes.")
@click.option("--cpus-per-task", type=click.IntRange(1), metavar="N", help="Cores per process.")
@click.option("--mem-gb", type=options.POSITIVE, metavar="N", help="Memory per node, in GiB.")
@click.option("--time", "limit", default="4:00:00", metavar="LIMIT", help="H:MM:SS, D-HH:MM:SS or minutes.")
@click.option(
    "--array", type=click.IntRange(2, 10000), metavar="N", help="For extract: N jobs, each with every N-th video."
)
@click.option("--slurm", "more", multiple=True, metavar="KEY=VALUE", help="Any other option of sbatch. Repeatable.")
@click.option(
    "--max-requeues",
    type=click.IntRange(0),
    default=30,
    metavar="N",
    help="How many times the job may return to the queue, at its time limit or when preempted.",
)
@click.option("--dry-run", is_flag=True, help="Print the script; write and submit nothing.")
def submit(stage: str, arguments: tuple[str, ...], limit: str, dry_run: bool, **chosen: Any) -> None:
    """Run a command as a Slurm job that resumes after its time limit.

    For example: submit train-cnn --partition gpu --gpus-per-node 2 -- --name first

    The options after -- are those of STAGE; they are checked before anything is submitted. Shortly before the time
    limit, or when the cluster preempts the job, the stage saves its state and the job returns to the queue. When it
    starts again, it resumes. Script, command, parameters and logs are kept in RUN/slurm. See docs/clusters.md.
    """
    from commands import slurm

    run = run_of_stage(stage, arguments, chosen["array"], several=chosen["nodes"] * (chosen["gpus_per_node"] or 1) > 1)
    request = slurm.Request(stage=stage, arguments=arguments, time_min=slurm.parse_time_limit(limit), **chosen)
    submission = slurm.submit(request, run, PROGRAM, dry_run=dry_run)
    for line in submission.sentences():
        click.echo(line, err=dry_run)
    if dry_run:
        click.echo(f"requeued:  up to {request.max_requeues} times", err=True)
        click.echo(submission.script, nl=False)


def run_of_stage(stage: str, arguments: tuple[str, ...], array: int | None, several: bool) -> Path:
    """Check a stage's command line, and return its run folder.

    `several` says whether the job will have more than one process. Raises UserError, or an error of click, for
    everything wrong in the command line that can be noticed without the data.
    """
    context = click.get_current_context().find_root()
    assert isinstance(context.command, click.Group)
    command = context.command.get_command(context, stage)
    assert command is not None  # every name in STAGES is a command
    try:
        stage_context = command.make_context(stage, list(arguments))
    except click.exceptions.Exit:
        raise UserError(f"submit {stage}: --help runs no job; use `{stage} --help`") from None
    given = stage_context.params
    if given.get("devices") and several:
        raise UserError("--devices: --nodes and --gpus-per-node already start one process per GPU; leave it out")
    if stage == "extract":
        shard_of_process(given["shard"])
        if array and stage_context.get_parameter_source("shard") is click.core.ParameterSource.COMMANDLINE:
            raise UserError("--shard: --array sets it for each job; leave it out")
    if stage == "evaluate" and given["predictions"] is not None:
        raise UserError("evaluate --predictions: this takes only seconds and has no run folder; call it without submit")
    if stage in ("ablate", "compare-encoders"):
        from configs.load import load_ablation, load_encoder_comparison

        load = load_ablation if stage == "ablate" else load_encoder_comparison
        source = given["base"] or load(given["file"]).base
        return Settings(source, given["overrides"]).run(given["name"] or Path(given["file"]).stem)
    return Settings(given["source"], given["overrides"], given["name"]).run()
