# SPDX-License-Identifier: Apache-2.0
"""Runs of a bundle from the command line: what can be checked is checked before any work, and an error comes last."""

from __future__ import annotations

import glob
import logging
import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import OptionalImportError
from tqdm import tqdm

from mgipt_monai.installed import installed, near
from mgipt_monai.stream.signals import StoppedError, stopping_cleanly
from mgipt_monai.utils.files import first_cause, is_own, root_cause

__all__ = ["BundleRun", "as_path", "errors_last", "read_settings", "split_settings"]

RUN_OPTIONS = ("run_id", "init_id", "final_id", "meta_file", "logging_file", "tracking")
"""What ``python -m monai.bundle run`` itself takes, beside the keys of the configs."""

EXPRESSION = ("$", "@", "%")  # what these begin stands for another value
ENGINES = ("Engine", "StreamingAdaptationEvaluator", "SupervisedEvaluator", "SupervisedTrainer")


def split_settings(arguments: Sequence[str], own: Collection[str]) -> tuple[list[str], dict[str, str | None]]:
    """Take the configs' keys out of a command line, by the rules of MONAI's own: ``--key value`` or ``--key=value``.

    Args:
        arguments: the command line.
        own: options of the command, which stay.

    Returns:
        What stays, and from key to value as written, None for a key alone.

    Example:
        >>> split_settings(["in", "out", "--limit", "3", "--resume", "--config", "guard"], own=["--config"])
        (['in', 'out', '--config', 'guard'], {'limit': '3', 'resume': None})
    """
    rest: list[str] = []
    settings: dict[str, str | None] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name == "--" or name in own:
            rest.append(word)
            continue
        alone = not equals and (not words or _is_flag(words[0]))
        settings[name[2:].replace("-", "_")] = None if alone else value if equals else words.pop(0)
    return rest, settings


def _is_flag(word: str) -> bool:
    return re.match(r"--|-[a-zA-Z]", word) is not None


def read_settings(
    written: Mapping[str, str | None], config: Mapping[str, Any], own: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the values of keys on a command line, read as MONAI does: Python's literals, and all else as text.

    MONAI takes an unknown key without a word, and leaves out a key that is set to None. Here the one is an error, and
    the other is done.

    Args:
        written: key to value as written, as from :func:`split_settings`.
        config: the configs, merged.
        own: options of the command that may have been meant.

    Raises:
        ValueError: for a key that is in no config, or a value that cannot be meant.

    Example:
        >>> read_settings({"sites": "[a, b]", "limit": "None"}, {"sites": None, "limit": 5})
        {'sites': ['a', 'b'], 'limit': '$None'}
    """
    settings = {}
    parser = ConfigParser(deepcopy(dict(config)))
    for key, text in written.items():
        first = re.split("#|::", key)[0]
        if key in RUN_OPTIONS and text is not None:
            settings[key] = text
            continue
        if first not in config:
            known = [*config, *(option.lstrip("-") for option in own)]
            raise ValueError(
                f"there is no key {first} in the configs{near(first, known)}: `mgipt path` is where they are"
            )
        settings[key] = _value(key, text, before=parser.get(key))
        try:
            parser[key] = settings[key]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"--{key} cannot be set: {first} is {config[first]!r} in the configs") from None
    return settings


def _value(key: str, text: str | None, before: Any) -> Any:
    if text is None and not isinstance(before, bool):
        raise ValueError(f"--{key} has no value: write --{key} VALUE")
    value = True if text is None else DefaultParseValue(text)
    if value is None:
        return "$None"
    if value == "null":
        raise ValueError(f"--{key} null is a text on the command line: write --{key} None")
    if isinstance(before, bool) and not isinstance(value, bool) and not str(value).startswith(EXPRESSION):
        raise ValueError(f"--{key} is True or False, got {text}")
    return value


def as_path(path: str) -> str:
    """Return a value that is this path in a config, where a # would become :: and a first @ a reference.

    Example:
        >>> as_path("eyes"), as_path("eyes#2")
        ('eyes', "$'eyes\\\\x232'")
    """
    if "#" not in path and not path.startswith(EXPRESSION):
        return path
    return "$" + repr(path).replace("#", r"\x23").replace("@", r"\x40")


@dataclass
class BundleRun:
    """One run of ``python -m monai.bundle run``.

    Args:
        configs: files, merged in order.
        settings: values that override theirs.
    """

    configs: Sequence[str | os.PathLike]
    settings: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise an error for images, weights or a folder that cannot be used, before anything runs.

        Raises:
            FileNotFoundError: if there are no images or weights where they should be.
            NotADirectoryError: if the place of the output is a file.
        """
        source, weights, output = (self.value(key) for key in ("dataset_dir", "ckpt_path", "output_dir"))
        if isinstance(source, str) and not os.path.exists(source) and not glob.glob(source, recursive=True):
            raise FileNotFoundError(
                f"there is nothing at {source}: give a folder of images, a glob pattern or a list of images (JSON, CSV)"
            )
        if isinstance(weights, str) and not os.path.isfile(weights):
            raise FileNotFoundError(
                f"there are no weights at {weights}: give --weights a file with the source network's state dict"
            )
        if isinstance(output, str) and os.path.isfile(output):
            raise NotADirectoryError(f"{output} is a file: give a folder to write to")

    def value(self, key: str) -> Any:
        """Return the value of a key of the configs; None where it has none, or none can be told."""
        if key not in self._parser:
            return None
        try:
            return self._parser.get_parsed_content(key)
        except Exception:
            return None  # the run itself says what is wrong

    @cached_property
    def _parser(self) -> ConfigParser:
        parser = ConfigParser(ConfigParser.load_config_files([os.fspath(file) for file in self.configs]))
        parser.update({name: value for name, value in self.settings.items() if name not in RUN_OPTIONS})
        return parser

    @property
    def has_demo_weights(self) -> bool:
        """Whether the weights are those of the demo's network."""
        weights = self.value("ckpt_path")
        return weights is not None and Path(weights).resolve() == (installed() / "models" / "model.pt").resolve()

    def command(self) -> str:
        """Return the run as a line for a shell."""
        files = "[" + ",".join(repr(os.fspath(file)) for file in self.configs) + "]"
        words = [f"--config_file {_quoted(files)}"]
        for key, value in self.settings.items():
            text = value if isinstance(value, str) and DefaultParseValue(value) == value else repr(value)
            words.append(f"--{key}{'=' if _is_flag(text) else ' '}{_quoted(text)}")
        return " ".join(["python -m monai.bundle run", *words])

    def run(self) -> None:
        """Run it, as MONAI does."""
        workflow = ConfigWorkflow(config_file=[os.fspath(file) for file in self.configs], **self.settings)
        workflow.initialize()
        workflow.run()
        workflow.finalize()


def _quoted(text: str) -> str:
    if re.fullmatch(r"[\w@%+=:,./#-]+", text):
        return text
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


@contextmanager
def errors_last(debug: bool = False, resumes: str = "") -> Iterator[None]:
    """End the program where the block fails, with the first cause's message as the last lines of the standard error.

    MONAI re-raises errors up to three times and logs each; ignite logs that an engine ends.

    Args:
        debug: whether to leave all that as it is, the traceback included.
        resumes: how an interrupted run is continued.

    Raises:
        SystemExit: 1 for an error, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    if debug:
        with stopping_cleanly():
            yield
        return
    loggers = [logging.getLogger(f"ignite.engine.engine.{name}") for name in ENGINES]
    loggers.append(logging.getLogger("monai.bundle.workflows"))
    for logger in loggers:
        logger.addFilter(_is_news)
    goes_on = resumes and f": what is done is kept, and {resumes} goes on from there"
    try:
        with stopping_cleanly():
            yield
    except StoppedError as stop:
        _say(f"\nended by {stop}{goes_on}")
        raise SystemExit(stop.code) from None
    except KeyboardInterrupt:
        _say(f"\ninterrupted{goes_on}")
        # Python remembers an interrupted eval, such as MONAI's, until the next one, and would end itself by the signal
        eval("None")
        raise SystemExit(130) from None
    except Exception as error:
        _say(f"error: {_message(error)}")
        raise SystemExit(1) from None
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    told = record.exc_info or "terminating due to exception" in record.getMessage()
    # overlays lie in another folder than the bundle's configs, as they should
    usual = record.getMessage().startswith(
        ("Not all config files are in", "Setting logging properties", "Logging file is")
    )
    return not told and not usual


def _message(error: BaseException) -> str:
    text, error = root_cause(error), first_cause(error)
    if isinstance(error, OptionalImportError):  # behind its own message it has a traceback
        return text.partition("\n\n")[0]
    if "cannot find a suitable reader" in text:  # and here are those of all readers
        return f"{text.splitlines()[0]} Copy it again, or convert it to PNG or NIfTI"
    plain = isinstance(error, (ValueError, RuntimeError, OSError, ImportError))
    return text if plain or is_own(error) else f"{type(error).__name__}: {str(error).strip()} (--debug shows where)"


def _say(text: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # it would draw itself once more below the message
    sys.stdout.flush()  # what was logged before comes before
    print(text, file=sys.stderr)
