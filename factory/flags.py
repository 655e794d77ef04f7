"""Flags of the command line, read by argparse; a wrong one is an error like any other."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from mllm_factory.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing its usage. Flags and overrides may come in any order."""

    def __init__(self) -> None:
        super().__init__(prog="mllm-factory", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a UserError."""
        raise UserError(f"{message}; '--help' after the verb shows what it takes")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse.

        Raises:
            UserError: an unknown flag, or one without its value.
        """
        return self.parse_intermixed_args(argv)


def config_flags(parser: Parser) -> Parser:
    """Add what says which tree is meant: Hydra's flags, and the overrides."""
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("overrides", nargs="*")
    return parser


def json_flag(parser: Parser) -> Parser:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true")
    return parser


def plan_flags(parser: Parser) -> Parser:
    """Add what ``check`` plans for: so many processes, on such machines."""
    parser.add_argument("--processes", type=int)
    parser.add_argument("--machine", default="")
    return parser


def hydra_flags(parser: Parser) -> Parser:
    """Add Hydra's other flags."""
    for names in (("--multirun", "-m"), ("--run", "-r"), ("--resolve",), ("--hydra-help",)):
        parser.add_argument(*names, action="store_true")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--package", "-p")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    return parser


def shown(flags: argparse.Namespace) -> list[str]:
    """The flags that ask Hydra to print something instead of running."""
    argv: list[Any] = ["--hydra-help"] if flags.hydra_help else []
    argv += ["--cfg", flags.cfg] if flags.cfg else []
    argv += ["--resolve"] if flags.resolve else []
    argv += ["--package", flags.package] if flags.package else []
    return argv + (["--info", flags.info] if flags.info else [])
