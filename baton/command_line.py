"""Command lines that say what may have been meant. Standard library only: `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A command's parser refuses what it does not know itself, under its own usage line; the top one would else."""

    @property
    def see_help(self) -> str:
        """Where the user finds all flags."""
        return f"see `{self.prog} --help`"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base; never leaves a flag over."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [text for action in self._actions for text in action.option_strings]
            similar = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
            advice = f"did you mean {similar[0]}?" if similar else self.see_help
            self.refuse(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
        return parsed, unknown

    def refuse(self, sentence: str) -> NoReturn:
        """End with status 2 and say why."""
        self.error(sentence)


class TerseParser(Parser):
    """One whose flags are too many to be printed above every error: it says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """A flag can not be used."""
        self.refuse(f"{message}; {self.see_help}")

    def refuse(self, sentence: str) -> NoReturn:
        """As the base, in one line."""
        self.exit(2, f"baton: {sentence}\n")
