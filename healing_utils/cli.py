"""The command line: ``healing plan``, ``run``, ``status`` and ``report``."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from healing_utils import __version__
from healing_utils.base.errors import HealingError, choose


class Parser(argparse.ArgumentParser):
    """Tells in one line what is wrong; its help lists the parameters of a command with `-p`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"healing: {message}; see {self.prog} --help\n")

    def format_help(self) -> str:
        if self.get_default("parameters") is None:
            return super().format_help()
        from healing_utils.run.profiles import describe_parameters

        return f"{super().format_help()}\n{describe_parameters()}"


def _profiles(**_: object) -> list[str]:
    from healing_utils.run.profiles import known_profiles

    return list(known_profiles())


def _names(prefix: str, **_: object) -> list[str]:
    """Of parameters, where the word before is ``-p``: behind a name comes its value."""
    from healing_utils.study.parameters import Parameters

    before = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].removesuffix(prefix)
    before = before.rstrip("'\"")  # a quote that was opened
    return list(Parameters.model_fields) if before.split()[-1] == "-p" else []


def parser() -> Parser:
    """The arguments of all commands."""
    top = Parser(prog="healing", description="Break a language model, heal it.")
    top.add_argument("--version", action="version", version=f"healing {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run a profile, or go on: its cells, notebooks and page")
    plan = commands.add_parser("plan", help="show what a profile takes, and what of it is left")
    status = commands.add_parser("status", help="show done and missing cells, also while it runs")
    report = commands.add_parser("report", help="draw a run's analysis and page again")
    for one in (run, plan):
        profile = one.add_argument("profile", metavar="PROFILE", help="quick, ... or a YAML file")
        one.add_argument("--out", metavar="DIR", help="run's folder (default data/runs/PROFILE)")
        parameter = one.add_argument(
            "-p", dest="parameters", nargs=2, action="append", default=[],
            metavar=("NAME", "VALUE"), help="set a parameter, as in -p levels [1/6,1/2]",
        )  # fmt: skip
        profile.completer, parameter.completer = _profiles, _names  # for a shell's Tab
        one.add_argument("--shard", metavar="I/N", help="only that share of the cells: 2/8, say")
    executors = "workers (processes here), in-process or ray"
    run.add_argument("--executor", metavar="NAME", default="workers", help=executors)
    run.add_argument("--address", metavar="HOST:PORT", help="the Ray cluster's, from a node of it")
    run.add_argument("--again", action="store_true", help="execute finished notebooks too")
    for one in (status, report):
        one.add_argument("dir", nargs="?", metavar="DIR", help="a run (default: the newest)")
    return top


def answer(command: str, given: dict) -> str:
    """Do what is asked for; what is to be printed. What a command does not need is not imported."""
    if "parameters" in given:  # what is wrong with them is told at once: torch takes seconds
        from healing_utils.run import profiles

        given["parameters"] = dict(given["parameters"])
        profiles.settle(given["profile"], given["out"], given["parameters"])
    if command == "run":
        choose(given["executor"], ("workers", "in-process", "ray"), "executor")
        if given["address"] is not None and given["executor"] != "ray":
            raise HealingError("an address is for the executor ray: add --executor ray")
        # A cluster's or a container's polite stop is treated as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from healing_utils.run.sequence import run

        return run(**given)
    if command == "plan":
        from healing_utils.run.estimate import plan

        return plan(**given)
    from healing_utils.run.status import describe, find_run

    folder = find_run(given["dir"])
    if command == "status":
        return describe(folder)
    from healing_utils.run.sequence import report

    return report(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 2 wrong input, or a cell or notebook failed, 130
    stopped."""
    top = parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(top)
    given = vars(top.parse_args(arguments))
    try:
        print(answer(given.pop("command"), given))
    except BrokenPipeError:  # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (HealingError, OSError, RecursionError) as error:
        print("healing:", *str(error).splitlines(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Everything finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    return 0
