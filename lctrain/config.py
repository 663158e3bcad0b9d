"""Find, compose, check and write configs, and explain mistakes in them.

This works in a checkout and in an installed wheel, and never imports torch.
"""

import difflib
import inspect
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from lctrain.errors import InputError
from lctrain.validate import check_values

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE / "share" if (_PACKAGE / "share").is_dir() else _PACKAGE.parent  # a wheel contains share/

_SECRET_FIELD = re.compile(r"(?i)(api|access|private)_?key|passw|secret|credential|^token$|(auth|access|api|hf)_token$")
_SECRET_VARIABLE = re.compile(r"(?i)KEY|TOKEN|SECRET|PASSWORD")

_PATH = re.compile(
    r"run_dir|output|checkpoint|resume|model\.(tokenizer_)?path|(.+_)?attention\.path|data\.(.+\.)?(path|name)"
    r"|cache\.pattern\.path|retrieval\.pattern|evaluation\..+\.(path|words)"
)

_WIRED = re.compile(r"^(module\.)?(recipe\.|model\.)?(?=(attention|rope|tuning|objective|optimizer|scheduler)\.)")
"""The prefix of the place where a config group's object is built; users set options without it."""


def root() -> Path:
    """Return the folder with conf/, slurm/ and data/."""
    return _ROOT


def conf_dir() -> Path:
    return _ROOT / "conf"


def asset(name: str) -> str:
    """Return the absolute path of data/<name>, `${asset:<name>}` in a config, without checking that it exists."""
    return str(_ROOT / "data" / name)


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("asset", asset, replace=True)


def check_names(words: Sequence[str]) -> None:
    """Raise InputError for a user's file, in the folder of --config-dir, that has the name of one of lctrain's.

    Hydra would silently take lctrain's.
    """
    flags = re.findall(r"(?:^|\0)(?:--config-dir|-cd)[=\0]([^\0]+)", "\0".join(words))
    for folder in map(Path, flags):
        for path in sorted(folder.glob("*/*.yaml")):
            if (conf_dir() / path.relative_to(folder)).is_file():
                raise InputError(f"{path} has the name of a file of lctrain's, which would be taken; choose another")


def compose(verb: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return conf/<verb>.yaml with Hydra overrides, as `lctrain <verb> <overrides>` does. Raises InputError."""
    try:
        return _compose(verb, overrides)
    except Exception as error:
        raise explain(error, verb, overrides) or error from None


def _compose(verb: str, overrides: Sequence[str]) -> DictConfig:
    import hydra

    register_resolvers()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra.compose(verb, [expand_home(override) for override in overrides])


def expand_home(override: str) -> str:
    """Return an override such as `key=~/folder` with the home folder for `~`.

    Hydra can't read `~`, and shells replace it only after few option names.
    """
    return re.sub(r"(?<==)~(?=/|$)", lambda _: str(Path.home()), override)


def anchor_paths(cfg: DictConfig) -> None:
    """Make local paths absolute, in place, so that a written config is valid in any folder; `~` is the home folder."""
    for name, _ in _leaves(OmegaConf.to_container(cfg)):
        value = OmegaConf.select(cfg, name, throw_on_resolution_failure=False) if _PATH.fullmatch(name) else None
        if value in (None, "auto", "never"):
            continue
        path = Path(str(value)).expanduser()
        if name in ("run_dir", "output") or path.exists():  # else it is a hub's id, or a mistake, reported as typed
            OmegaConf.update(cfg, name, str(path.absolute()))


def check(cfg: DictConfig) -> None:
    """Raise InputError where a value is missing (`???`), has a wrong type, or is an interpolation without a target."""
    if isinstance(pattern := cfg.get("evaluation_attention"), str):
        group = "attention@evaluation_attention" if "module" in cfg else "attention"  # of a training, of an evaluation
        raise InputError(f"choose the evaluated attention with {group}={pattern}")
    raw: Any = OmegaConf.to_container(cfg)
    missing = [name for name, value in _leaves(raw) if value == "???"]
    if missing:
        raise InputError(f"no value for {_listed(missing)}: give {' '.join(f'{name}=…' for name in missing)}")
    try:
        resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"cannot resolve '{error.full_key}': {_one_line(error)}") from None
    check_values(raw, resolved)


def public(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved config as plain containers with secrets as '***', for files, logs and W&B."""
    variables = {value for name, value in os.environ.items() if value and _SECRET_VARIABLE.search(name)}

    def mask(node: Any, field: str) -> Any:
        if isinstance(node, dict):
            return {key: mask(value, str(key)) for key, value in node.items()}
        if isinstance(node, list):
            return [mask(value, field) for value in node]
        if not isinstance(node, str):
            return node
        # Inside a longer text only values of 8 or more characters: TOKENIZERS_PARALLELISM=1 must not hide every 1.
        known = node in variables or any(len(value) >= 8 and value in node for value in variables)
        return "***" if known or _SECRET_FIELD.search(field) else node

    plain: dict[str, Any] = mask(OmegaConf.to_container(cfg, resolve=True), "")
    return plain


def dump(cfg: DictConfig) -> str:
    """Return `public(cfg)` as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(public(cfg)))


def groups(verb: str) -> dict[str, tuple[str | None, list[str]]]:
    """Return config group → (default choice, all choices) of conf/<verb>.yaml, read from the files alone."""
    found: dict[str, tuple[str | None, list[str]]] = {}
    for entry in OmegaConf.select(OmegaConf.load(conf_dir() / f"{verb}.yaml"), "defaults", default=[]):
        if isinstance(entry, str):
            found |= {} if entry == "_self_" else groups(entry)
            continue
        ((key, default),) = entry.items()
        name = str(key).removeprefix("override").strip(" /")
        files = (conf_dir() / name.split("@")[0]).glob("*.yaml")
        if name != "hydra":
            found[name] = (default, sorted(f.stem for f in files))
    return found


def explain(error: BaseException, verb: str, overrides: Sequence[str] = ()) -> InputError | None:
    """Return the user's mistake as an InputError of one line, with the nearest valid name; None if it is not theirs."""
    from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException

    if isinstance(error, InputError):
        return error
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error)
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return InputError(nearest(f"no {group or 'config'} '{choice}'", choice, error.options or [], show_all=True))
    if isinstance(error, OverrideParseException):
        written = "options are written option=value" if "=" not in str(error.override) else _one_line(error)
        return InputError(f"cannot read '{error.override}': {written}")
    if isinstance(error, HydraException):
        unknown = re.match(r"Could not override '([^']+)'", str(error))
        return InputError(_no_such_option(unknown[1], verb, overrides) if unknown else _one_line(error))
    if isinstance(error, MissingMandatoryValue | InterpolationResolutionError):
        return InputError(_one_line(error))
    return None


def nearest(problem: str, name: str, existing: Sequence[str], *, prefix: str = "", show_all: bool = False) -> str:
    """Return `problem` followed by the nearest existing name, and by all choices if `show_all`."""
    match = difflib.get_close_matches(name, existing, n=1, cutoff=0.5)
    guess = f"; did you mean '{prefix}{match[0]}'?" if match else ""
    return problem + guess + (f" (choices: {', '.join(existing)})" if show_all and existing else "")


def _no_such_option(name: str, verb: str, overrides: Sequence[str]) -> str:
    """Return the message for an option that does not exist, with the nearest option under the chosen config groups.

    Options with the same last part as `name` come first.
    """
    if others := _choices_with(name):
        group = name.partition(".")[0]
        return f"no such option '{name}' under this {group}; it is one of {group}={' or '.join(others)}"
    chosen = [o for o in overrides if re.match(r"[\w/@+]+=", o) and not o.startswith(f"{name}=")]
    try:
        existing = list(dict.fromkeys(_keys(OmegaConf.to_container(_compose(verb, chosen)))))
    except Exception:  # another override is wrong too, so that the options are unknown: report this one without a guess
        existing = []
    alike = [key for key in existing if key.rpartition(".")[2] == name.rpartition(".")[2]]
    return nearest(f"no such option '{name}'", name, alike or existing)


def _choices_with(name: str) -> list[str]:
    """Return the choices of a config group that have the option; dotted `name` is <group>.<option>."""
    group, _, option = name.partition(".")
    files = sorted((conf_dir() / group).glob("*.yaml")) if option else []
    missing = object()
    return [f.stem for f in files if OmegaConf.select(OmegaConf.load(f), option, default=missing) is not missing]


def _explain_instantiation(error: BaseException) -> InputError | None:
    from hydra.errors import InstantiationException
    from hydra.utils import get_object

    text, cause = str(error), error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    where = re.search(r"full_key: (\S+)", text)
    prefix = _WIRED.sub("", f"{where[1]}.") if where else ""
    if isinstance(cause, InputError):
        return cause
    if text.startswith("Error locating target"):
        return InputError(f"{prefix}_target_: {_one_line(cause)}")
    target = re.search(r"target '([^']+)'", text)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(cause))
    if isinstance(cause, TypeError) and target and unknown:
        fields = [name for name in inspect.signature(get_object(target[1])).parameters if name != "self"]
        if unknown[1] not in fields:
            return InputError(nearest(f"no such option '{prefix}{unknown[1]}'", unknown[1], fields, prefix=prefix))
    if isinstance(cause, TypeError) and re.search(r"__init__\(\) missing \d+ required", str(cause)):
        return InputError(f"{prefix.rstrip('.')}: {cause}")
    if isinstance(cause, TypeError | ValueError) and _raised_in(cause) in ("__init__", "__post_init__"):
        return InputError(f"{prefix.rstrip('.')}: {_one_line(cause)}")
    return None


def _raised_in(error: BaseException) -> str:
    """Return the name of the function that raised `error`."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1:]
    return innermost[0][0].f_code.co_name if innermost else ""


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from _leaves(value, f"{prefix}{key}.")
    if not isinstance(node, dict | list):
        yield prefix[:-1], node


def _keys(tree: Any) -> Iterator[str]:
    """Yield every dotted name, also of inner nodes; names may repeat."""
    for name, _ in _leaves(tree):
        parts = name.split(".")
        yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _one_line(error: BaseException) -> str:
    return " ".join(re.sub(r"See https://\S+.*|full_key: .*|object_type=.*", "", str(error)).split())
