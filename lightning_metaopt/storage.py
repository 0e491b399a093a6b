"""Rules in files: safetensors with a JSON header. Nothing is imported or executed on a file's word."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_metaopt import rules
from lightning_metaopt.rule import Rule
from lightning_metaopt.tree import Tree

__all__ = ["RuleFileError", "load_rule", "read_header", "save_rule", "shipped_rules"]

SHIPPED = Path(__file__).parent / "pretrained"
FORMAT = 1
KEY = "lightning_metaopt"  # the one entry of the file's metadata; its value is the header as JSON


class RuleFileError(ValueError):
    """A file that holds no rule, or none that can be loaded; the message names the file and the remedy."""


def save_rule(rule: Rule, path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None) -> None:
    """Write a rule to one file: its class by name, its constructor arguments, its meta-parameters and where it comes from.

    The file is complete or not there: it is written beside ``path`` and then moved into place. A rule whose
    meta-parameters are not finite is written too, as a record, but :func:`load_rule` refuses it.

    Args:
        rule: the rule; :attr:`~lightning_metaopt.Rule.config` must be JSON-able.
        path: where; missing folders are made.
        provenance: JSON-able facts about the training, such as ``recipe`` and ``seed``. The versions of Python, torch and
            this package are added under ``versions``.

    Raises:
        TypeError: for what is not a :class:`~lightning_metaopt.Rule`, or for arguments or facts that JSON cannot hold.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"only rules can be saved, got {type(rule).__name__}")
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in rule.state_dict().items()}
    header = {
        "format": FORMAT,
        "class": _name_of(type(rule)),
        "init": rule.config,
        "provenance": {"versions": _versions(), **(provenance or {})},
        "sha256": _digest(tensors),
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"cannot save {type(rule).__name__}: its config and the provenance must be plain JSON values ({error})"
        ) from error
    _write(Path(path), save(tensors, {KEY: text}))


def load_rule(path: str | os.PathLike[str], rule_class: type[Rule] | None = None, **init: Any) -> Rule:
    """Rebuild a rule that :func:`save_rule` wrote, on the CPU, in the precision it was saved in.

    Args:
        path: the file, or the name of one of :func:`shipped_rules`, such as ``"metamd-digits"``.
        rule_class: the class of a rule that is not part of this package. (The classes of ``lightning_metaopt.rules`` are
            found by name.)
        init: constructor arguments that replace or complete those in the file: what a file cannot hold, such as the
            ``problem`` of a :class:`~lightning_metaopt.rules.ConvexProgram`.

    Raises:
        RuleFileError: if the file is missing, damaged, foreign or of a newer format, if its class is unknown, if its
            tensors do not fit the class, or if they are not finite.

    >>> import tempfile, lightning_metaopt as lmo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lmo.save_rule(lmo.rules.GradientDescent(lr=0.5), f"{folder}/gd.safetensors")
    ...     lmo.load_rule(f"{folder}/gd.safetensors").describe()
    {'lr': 0.5}
    """
    header, tensors = _read(path)
    cls = _find_class(path, header["class"], rule_class)
    try:
        rule = cls(**{**header["init"], **init})
        expected = rule.state_dict()
    except Exception as error:  # a constructor may object in any way to arguments from a damaged or foreign file
        raise RuleFileError(
            f"{path}: {cls.__name__} cannot be built from the file's arguments ({type(error).__name__}: {error}). If the class "
            "has changed or needs more than a file can hold, pass those arguments to load_rule by name"
        ) from error
    _check(path, cls, expected, tensors)
    rule.load_state_dict(tensors, strict=True, assign=True)
    return rule


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a rule file, or a shipped rule, says about itself: ``format``, ``class``, ``init``, ``provenance`` and ``sha256`` of
    the tensors.

    Raises:
        RuleFileError: if it is no readable rule file.
    """
    return _read(path)[0]


def shipped_rules() -> list[str]:
    """Names of the meta-trained rules that are part of the package; how each was made stands in ``provenance`` of its header.

    >>> shipped_rules()
    ['metamd-digits', 'ml2o-lasso', 'rnnprop-small']
    """
    return sorted(file.stem for file in SHIPPED.glob("*.safetensors"))


def _registry() -> dict[str, type[Rule]]:
    known = {name: getattr(rules, name) for name in rules.__all__}
    return {name: cls for name, cls in known.items() if isinstance(cls, type) and issubclass(cls, Rule)}


def _name_of(cls: type[Rule]) -> str:
    # Short for our own; a stranger of the same name must not be taken for one of them.
    return cls.__name__ if _registry().get(cls.__name__) is cls else f"{cls.__module__}.{cls.__qualname__}"


def _find_class(path: str | os.PathLike[str], name: str, rule_class: type[Rule] | None) -> type[Rule]:
    if rule_class is None:
        known = _registry()
        if name not in known:
            raise RuleFileError(
                f"{path}: the rule's class {name!r} is not one of this package ({', '.join(sorted(known))}); pass it as "
                "load_rule(path, rule_class=...), or upgrade lightning_metaopt if the file is newer"
            )
        return known[name]
    if not (isinstance(rule_class, type) and issubclass(rule_class, Rule)):
        raise TypeError(f"rule_class must be a subclass of Rule, got {rule_class!r}")
    if name.rpartition(".")[2] != rule_class.__name__:
        raise RuleFileError(f"{path}: the file holds a {name}, not a {rule_class.__name__}; pass the class that was saved")
    return rule_class


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Tree]:
    file = Path(path)
    if not file.is_file() and os.fspath(path) in shipped_rules():  # a file of that name goes before
        file = SHIPPED / f"{path}.safetensors"
    if not file.is_file():
        raise RuleFileError(
            f"{path}: there is no such file; check the path (the working directory is {Path.cwd()}), or name a rule that is part "
            f"of the package ({', '.join(shipped_rules())})"
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()
            tensors = {name: opened.get_tensor(name).clone() for name in names}  # copies: the file may be replaced
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RuleFileError(
            f"{path}: not a readable safetensors file ({type(error).__name__}: {error}); it is truncated, damaged or something "
            "else. Copy it again, or save the rule anew with save_rule"
        ) from error
    if KEY not in metadata:
        raise RuleFileError(
            f"{path}: a safetensors file, but not of a rule (no {KEY!r} in its metadata); files of rules are written by save_rule"
        )
    return _parse(path, metadata[KEY], tensors), tensors


def _parse(path: str | os.PathLike[str], text: str, tensors: Tree) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RuleFileError(f"{path}: the header is damaged ({error}); save the rule anew with save_rule") from error
    found = header.get("format") if isinstance(header, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise RuleFileError(f"{path}: written in format {found}, this version reads up to {FORMAT}; upgrade lightning_metaopt")
    wanted = {"format": int, "class": str, "init": dict, "provenance": dict, "sha256": str}
    wrong = [key for key, kind in wanted.items() if not isinstance(header, dict) or not isinstance(header.get(key), kind)]
    if wrong or found != FORMAT:
        raise RuleFileError(f"{path}: the header is damaged ({', '.join(wrong or ['format'])}); save the rule anew with save_rule")
    if header["sha256"] != _digest(tensors):
        raise RuleFileError(f"{path}: the tensors are not those that were saved (checksum differs); copy the file again")
    return dict(header)


def _check(path: str | os.PathLike[str], cls: type[Rule], expected: Mapping[str, Tensor], tensors: Tree) -> None:
    missing, strange = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or strange:
        raise RuleFileError(
            f"{path}: the tensors are not those of {cls.__name__} (missing: {', '.join(missing) or 'none'}; unknown: "
            f"{', '.join(strange) or 'none'}). The file was changed, or the class has; use the version that wrote it (read_header)"
        )
    for name, template in expected.items():
        value = tensors[name]
        if value.shape != template.shape:
            raise RuleFileError(
                f"{path}: {name!r} has shape {tuple(value.shape)}, {cls.__name__} built from the file's arguments has "
                f"{tuple(template.shape)}. The file was changed, or arguments were passed that do not belong to it"
            )
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if value.dtype != template.dtype and not (value.dtype in floats and template.dtype in floats):
            raise RuleFileError(f"{path}: {name!r} is {value.dtype}, expected {template.dtype}; save the rule anew with save_rule")
        if value.dtype in floats and not bool(value.isfinite().all()):
            raise RuleFileError(f"{path}: {name!r} is not finite, so meta-training had diverged; load an earlier rule")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes files that only their owner can read; give the usual permissions
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _digest(tensors: Tree) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        total.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _versions() -> dict[str, str]:
    try:
        own = version("lightning_metaopt")
    except PackageNotFoundError:  # used from a source tree
        own = "unknown"
    return {"lightning_metaopt": own, "torch": torch.__version__, "python": platform.python_version()}
