"""The options with which commands choose the trained nets of a run for new videos."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands import options
from commands.options import Callback, Settings

if TYPE_CHECKING:
    from live.nets import Nets

CHOICES = (
    options.MODEL,
    click.option(
        "--from-cnn", "cnn_run", metavar="RUN", help="Run whose stage one made the features. Default: this run."
    ),
    click.option("--from-joint", "joint_run", metavar="RUN", help="Run whose joint net made the features."),
    options.INFERENCE,
    options.DECODING,
    options.TRUSTED,
)


@dataclass(frozen=True)
class NetChoice:
    """The values of these options."""

    settings: Settings
    model: str
    cnn_run: str | None
    joint_run: str | None
    inference: Any
    decoding: Any
    trusted: bool

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return self.settings.run()

    def load(self, changes: Mapping[str, object] | None = None) -> Nets:
        """The nets, with `changes` of settings by key.

        Raises UserError for options that have no effect, and if the nets cannot be loaded.
        """
        from live.nets import joint_net, pair_of_stages

        settings, run, command = self.settings, self.run, str(click.get_current_context().info_name)
        if joint := options.uses_joint(self.model, run):
            of_stages = ("cnn_run", "joint_run", "trusted", "decoding")
            options.refuse("a joint net, which makes its own features", options.given(*of_stages))
        checkpoint = settings.joint_checkpoint(self.joint_run)
        chosen = {"extract.checkpoint": checkpoint, "temporal.decoding.mode": self.decoding}
        config = settings.changed({**(changes or {}), **chosen})
        if joint:
            return joint_net(config, run, self.inference, settings.given(), command)
        options.refuse_trusted(self.trusted, options.known_encoder(config))
        if not options.uses_stage_one(config):
            options.refuse("--from-joint, extract.checkpoint or extract.encoder=initial", options.given("cnn_run"))
        return pair_of_stages(
            config,
            run,
            settings.other_run(self.cnn_run),
            self.inference,
            trusted=self.trusted,
            given=settings.given(),
            command=command,
        )


def net_options(command: Callback) -> Callback:
    """Add these options and those of settings to a command, which gets them as one argument `net: NetChoice`."""

    @functools.wraps(command)
    def with_choice(*arguments: Any, settings: Settings, **given: Any) -> Any:
        names = ("model", "cnn_run", "joint_run", "inference", "decoding", "trusted")
        net = NetChoice(settings, **{name: given.pop(name) for name in names})
        return command(*arguments, net=net, **given)

    with_options: Callback = with_choice
    for option in reversed(CHOICES):
        with_options = option(with_options)
    return options.settings()(with_options)
