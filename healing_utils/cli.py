"""The command line: ``healing plan``, ``run``, ``status`` and ``report``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from healing_utils.base.errors import HealingError, choose

EXECUTORS = ("workers", "in-process", "ray")


def parse_value(text: str) -> Any:
    """What a value on the command line means: a YAML scalar or list, else the text itself.

    Where YAML 1.1 would turn text into another thing than it says (``1:30`` into 90, ``012`` into
    10, a date into an object), the text stays; the check of the parameters understands or refuses
    it.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, int) and not isinstance(value, bool) and str(value) != text.strip():
        return text
    return value if value is None or isinstance(value, bool | int | float | str | list) else text


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(prog="healing", description="Break a language model, heal it.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="compute a profile's cells and run its notebooks; the same command goes on after a "
        "stop",
        description="Compute a profile's cells, run its notebooks in sequence, and write the page. "
        "What is done is never done twice.",
    )
    plan = commands.add_parser(
        "plan",
        help="show what a profile takes: cells, tokens, operations, disk and time",
        description="Show, stage by stage, what a profile takes on this machine: cells that are "
        "planned and left, tokens, operations, disk, and the time by records that are there, else "
        "by a short trial of each kind of cell. The estimate is kept in the run's folder, and "
        "`healing run` says in the end how far off it was.",
    )
    for command in (run, plan):
        command.add_argument("profile", metavar="PROFILE", help="quick, minilm, ... or a YAML file")
        command.add_argument(
            "--out", metavar="DIR", help="run's folder (default data/runs/PROFILE)"
        )
        command.add_argument(
            "-p", dest="parameters", nargs=2, action="append", default=[],
            metavar=("NAME", "VALUE"),
            help="set a parameter, as in -p model bert-base-uncased -p levels [1/6,1/2]",
        )  # fmt: skip
    run.add_argument(
        "--executor", metavar="NAME", default="workers",
        help="where cells are computed: workers (default: processes here), in-process, ray",
    )  # fmt: skip
    run.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="the Ray cluster's; run this on one of its nodes (default: Ray's own rules)",
    )
    for command, what in (
        (run, "compute only the I-th of N shares of the cells, no notebooks: 1/1 is all of them"),
        (plan, "of the I-th of N shares of the cells, which another machine computes each"),
    ):
        command.add_argument("--shard", metavar="I/N", help=what)
    run.add_argument(
        "--again",
        action="store_true",
        help="execute finished notebooks too, to draw their figures anew; cells stay as they are",
    )
    for name, text in (
        ("status", "show done, running and missing cells, also while it runs"),
        ("report", "write the run's page again"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("dir", nargs="?", metavar="DIR", help="a run (default: the newest)")
    return top


def _run(given: argparse.Namespace, overrides: list[tuple[str, Any]]) -> int:
    # A cluster's or a container's polite stop is treated as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    choose(given.executor, EXECUTORS, "executor")
    if given.address is not None and given.executor != "ray":
        raise HealingError("an address is for the executor ray: add --executor ray")
    from healing_utils.run import sequence
    from healing_utils.run.profiles import Shard

    where = {"executor": given.executor, "address": given.address}
    try:
        if given.shard is not None:
            share = Shard.read(given.shard)
            print(sequence.run_shard(given.profile, share, given.out, overrides, **where))
        else:
            print(sequence.run(given.profile, given.out, overrides, again=given.again, **where))
    except sequence.NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Everything finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0


def _plan(given: argparse.Namespace, overrides: list[tuple[str, Any]]) -> int:
    from healing_utils.run import estimate, profiles
    from healing_utils.study.study import Study

    share = profiles.Shard.read(given.shard) if given.shard is not None else profiles.Shard()
    name, parameters = profiles.settle(given.profile, given.out, overrides)
    study = Study(parameters)
    found = estimate.make(study, share)
    whose = f"shard {share} of profile" if share.count > 1 else "profile"
    print(estimate.describe(found, study, f"Plan of {whose} {name} in {study.run_folder}"))
    kept = estimate.keep(found, study.run_folder)
    print(f"estimate kept in {kept}" if kept else "everything is done")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 a notebook failed, 2 wrong input."""
    given = parser().parse_args(arguments)
    try:
        if given.command in ("run", "plan"):
            overrides = [(name, parse_value(value)) for name, value in given.parameters]
            with contextlib.suppress(KeyboardInterrupt):
                return (_run if given.command == "run" else _plan)(given, overrides)
            return 130
        from healing_utils.run import status

        target = status.find_run(given.dir)
        if given.command == "report":
            from healing_utils.run.page import write_page

            print(write_page(target))
        else:
            print(status.describe(target))
    except HealingError as error:
        print(f"healing: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
