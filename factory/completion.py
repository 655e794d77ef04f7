"""Shell completion: verbs from here, groups, presets and keys from Hydra. Torch stays out.

``mllm-factory completion bash`` prints a script; the shell then asks ``mllm-factory completion --query "<line>"`` for words.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from mllm_factory.cli import VERBS
from mllm_factory.errors import UserError, hint

COMPOSED = ("train", "evaluate", "imbalance", "check")
EXPORTED = ("checkpoint", "merge", "output", "trust_components")
"""The options of ``export``."""
REPORTED = ("--columns", "--main", "--up", "--down", "--output", "--by", "--any", "--json")
"""The flags of ``report``."""

_BASH = """\
_mllm_factory() {
    local line="${COMP_LINE:0:$COMP_POINT}" word
    [ -n "$line" ] || line="${COMP_WORDS[*]:0:$((COMP_CWORD + 1))}"
    word="${line##* }"
    COMPREPLY=($(compgen -W "$(mllm-factory completion --query "$line" 2>/dev/null)" -- "$word"))
    # readline breaks words at '='; hand back only what comes after it
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    fi
}
complete -o nospace -o default -F _mllm_factory mllm-factory
"""

_ZSH = """\
#compdef mllm-factory
_mllm_factory() {
    local -a found
    found=(${(f)"$(mllm-factory completion --query "${words[1,CURRENT]}" 2>/dev/null)"})
    compadd -Q -S '' -- $found
}
compdef _mllm_factory mllm-factory
"""

_FISH = """\
function __mllm_factory
    mllm-factory completion --query (commandline -cp) 2>/dev/null
end
complete -c mllm-factory -f -a '(__mllm_factory)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(argv: Sequence[str]) -> int:
    """The verb ``completion``: print a script, or with ``--query LINE`` the words that can end the line."""
    if len(argv) == 2 and argv[0] == "--query":
        print("\n".join(candidates(argv[1])))
        return 0
    if len(argv) != 1 or argv[0] not in SCRIPTS:
        raise UserError(f"completion takes a shell{hint(argv[0] if argv else '', SCRIPTS)}")
    print(SCRIPTS[argv[0]], end="")
    return 0


def candidates(line: str) -> list[str]:
    """The words that can stand where a command line such as ``mllm-factory train visi`` ends."""
    words = line.split()[1:]
    current = "" if not words or line[-1].isspace() else words.pop()
    if not words:
        return [f"{verb} " for verb in VERBS if verb.startswith(current)]
    verb, rest = words[0], words[1:]
    if verb == "completion":
        return [shell for shell in SCRIPTS if shell.startswith(current)]
    if verb in ("list", "describe"):
        return import_module("mllm_factory.catalog").complete(verb, rest, current)
    if verb == "export":
        return [f"{option}=" for option in EXPORTED if option.startswith(current)]
    if verb == "report":  # folders are the shell's own
        return [f"{flag} " for flag in REPORTED if flag.startswith(current)] if current.startswith("-") else []
    return _overrides(verb, rest, current) if verb in COMPOSED else []


def _overrides(verb: str, words: Sequence[str], current: str) -> list[str]:
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from mllm_factory.config import VERSION_BASE

    done = [word for word in words if "=" in word and not word.startswith("-")]
    folders = [folder for flag, folder in pairwise(words) if flag in ("--config-dir", "-cd")]
    done += [f"hydra.searchpath=[file://{Path(folder).absolute()}]" for folder in folders[-1:]]
    with initialize_config_module("mllm_factory.conf", verb, VERSION_BASE):
        plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
        name = "evaluate" if verb in ("evaluate", "imbalance") else "train"
        found = plugin._query(name, " ".join([*done, current]) if current else " ".join([*done, ""]))
    return [word for word in found if not word.startswith("hydra") or current.startswith("hydra")]
