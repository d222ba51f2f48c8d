"""The command line: ``healing plan``, ``run``, ``status`` and ``report``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from healing_utils.base.errors import HealingError
from healing_utils.run import runner


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


def _add_profile(command: argparse.ArgumentParser) -> None:
    """The arguments that say which study is meant."""
    command.add_argument("profile", metavar="PROFILE", help="quick, minilm, paper, or a YAML file")
    command.add_argument(
        "--out", metavar="DIR", help="the run's folder (default data/runs/PROFILE)"
    )
    command.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a parameter, as in -p model bert-base-uncased -p levels [1/6,1/2]",
    )


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(prog="healing", description="Break a language model, heal it.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run the notebooks of a profile; the same command goes on after a stop",
        description="Run the notebooks of a profile in sequence. What is done is never done twice.",
    )
    plan = commands.add_parser(
        "plan",
        help="show what a profile takes: cells, tokens, operations, disk and time",
        description="Show, stage by stage, what a profile takes on this machine: cells that are "
        "planned, done and left, tokens, operations, disk, and the time by a short trial of the "
        "real loop. Nothing is run. The estimate is kept in the run's folder, and `healing run` "
        "says in the end how far off it was.",
    )
    for command in (run, plan):
        _add_profile(command)
    run.add_argument(
        "--executor",
        metavar="NAME",
        help="where cells are computed: in-process, workers (default: processes here), ray",
    )
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


def _run(arguments: argparse.Namespace) -> int:
    # A cluster's or a container's polite stop is treated as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    overrides = [(name, parse_value(value)) for name, value in arguments.parameters]
    from healing_utils.run import executors

    try:
        with _environment(executors.choice(arguments.executor, arguments.address, arguments.shard)):
            executors.chosen().check()  # refused now, not in the first notebook
            if os.environ.get("HEALING_SHARD"):
                print(runner.run_shard(arguments.profile, arguments.out, overrides))
                return 0
            page = runner.run(arguments.profile, arguments.out, overrides, again=arguments.again)
    except runner.NotebookFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Everything finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    print(page)
    return 0


@contextlib.contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """These variables, as long as the block runs."""
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def _plan(arguments: argparse.Namespace) -> int:
    overrides = [(name, parse_value(value)) for name, value in arguments.parameters]
    name, target, parameters = runner.settle(arguments.profile, arguments.out, overrides)
    from healing_utils.run import executors, plan
    from healing_utils.study.parameters import read_parameters
    from healing_utils.study.study import Study

    if (target / "parameters.json").exists():  # of another study: refused, as by `run`
        runner.keep_parameters(target, parameters, read_parameters)
    with _environment(executors.choice(None, None, arguments.shard)):
        share = executors.shard()
        found = plan.make(Study(parameters))
    whose = f"shard {share} of profile" if share.count > 1 else "profile"
    print(plan.describe(found, f"Plan of {whose} {name} in {target}"))
    kept = plan.keep(found, target)
    print(f"estimate kept in {kept}" if kept else "everything is done")
    return 0


def _report(target: Path) -> int:
    from healing_utils.run.page import write_page

    print(write_page(target))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 a notebook failed, 2 wrong input."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "run":
            return _run(given)
        if given.command == "plan":
            with contextlib.suppress(KeyboardInterrupt):
                return _plan(given)
            return 130
        target = runner.find_run(given.dir)
        if given.command == "report":
            return _report(target)
        print(runner.describe(target))
    except HealingError as error:
        print(f"healing: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
