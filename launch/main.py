"""Run `lctrain VERB [override …]`: find the verb, compose its config with Hydra, turn errors into exit codes."""

import importlib
import os
import re
import sys
from typing import Any

from launch.exit_codes import exit_codes
from launch.quiet import quiet
from launch.usage import HYDRAS_FLAGS, VERBS, overview, usage
from lctrain import __version__, config
from lctrain.errors import InputError


def main() -> None:
    """Run a verb; exit with 0 (done), 2 (wrong input: one line, nothing written), 75 (stopped on request), 1 (else)."""
    verb, *overrides = sys.argv[1:] or ["--help"]
    with exit_codes(verb, overrides):
        if verb in ("-h", "--help", "help"):
            print(overview())
        elif verb == "--version":
            print(f"lctrain {__version__}")
        elif verb not in VERBS:
            raise InputError(config.nearest(f"no command '{verb}'", verb, VERBS, show_all=True))
        elif {"-h", "--help"} & set(overrides):
            print(usage(verb))
        else:
            _compose_and_run(verb, overrides)


def _compose_and_run(verb: str, overrides: list[str]) -> None:
    import hydra

    command, module = sys.argv, importlib.import_module(f"launch.{verb}")
    overrides = [getattr(module, "WORDS", {}).get(word, word) for word in overrides]
    if unknown := [word for word in overrides if word.startswith("-") and not HYDRAS_FLAGS.fullmatch(word)]:
        raise InputError(f"no flag '{unknown[0]}': options are written option=value")
    config.check_names(overrides)
    if overrides and not re.search("=|^-", overrides[0]) and hasattr(module, "FIRST"):
        overrides[0] = f"{module.FIRST}={overrides[0]}"

    def task(cfg: Any) -> None:
        sys.argv = command  # restored for Lightning, which starts this program again for each device
        with exit_codes(verb, overrides):
            config.anchor_paths(cfg)
            config.check(cfg)
            if getattr(module, "LOADS_MODELS", True):
                quiet()
            module.run(cfg)

    config.register_resolvers()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors instead of printing them
    # Hydra's parser expects all overrides before the flags; here flags may stand anywhere.
    flags_last = sorted(overrides, key=lambda word: word.startswith("-") or not ("=" in word or word.startswith("~")))
    sys.argv = [command[0], *map(config.expand_home, flags_last)]
    hydra.main(version_base="1.3", config_path=str(config.conf_dir()), config_name=verb)(task)()
