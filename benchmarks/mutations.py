"""Configs, overrides and prompt files as nobody would write them, each a function of a random generator."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from leapalign.config import Config
from leapalign.methods import METHODS
from leapalign.rewards import REWARDS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
TINY: dict[str, Any] = {
    "threshold": 1.0,
    "model": {"path": "embedded:base", "height": 32, "width": 32, "dtype": "float32"},
    "prompts": {"path": "embedded:training_prompts.txt"},
    "reward": {"name": "pickscore", "path": "embedded:reward", "scale": "probability"},
    "rollout": {"num_steps": 4, "batch_size": 2},
    "train": {"iterations": 1, "batch_size": 2},
    "samples": {"every": 5, "count": 2},
}
"""Laid over a config, it makes one that runs in a moment."""
LONG = "9" * 5000
SCALARS: list[Any] = [
    None, True, False, 0, 1, 2, 3, 5, -1, 10**6, 10**12, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, 1.0, -0.5, 1e-9,
    1e-45, 1e-320, 1e9, 1e38, 1e300, float("nan"), float("inf"), -float("inf"), "", " ", "leapalign", "32", "1e-4",
    "x" * 300, "x" * 5000, LONG, "\0", "a\0b", "\ud800", "\u202e", "\n", "\x1b[31m", "☃", "../../etc/passwd", "/", ".",
    "a/b", "embedded:", "embedded:../x", "embedded:base", "bfloat16", "host", "streamed", "blocks", "flash", "native",
    "adafactor", "adamw_8bit", "cosine", [], {}, [1], [1, 2], [0, 3], [2, 6, 2], [2, 6, 2.5], [[[]]], {"a": 1}, {1: 2},
    {"name": "draft_k"}, {"name": 3}, {"name": None}, {"name": ["x"]}, [{"name": "pickscore"}], [3], ["pickscore"],
]  # fmt: skip
TEXTS = [
    b"\0", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\t", b"\r", b"\xe2\x80\xa8", b": ", b"- ", b"&a ", b"*a",
    b"<<: *a", b"!!python/object/apply:os.system [true]", b"!!int x", b"!!bool x", b"!!float x", b"!!timestamp x",
    b"!!binary x", b"!!set {a}", b"!!omap [a]", b"!!pairs [a: 1]", b"2001-99-99", b"1:99:99", b"0x", b"0o9", b"_",
    b"{", b"[", b"}", b"]", b"'", b'"', b"|", b">", b"%", b"@", b"`", b"?", b"#", b"---\n", b"...\n", b"\\ud800",
    b"[" * 3000, b"{a: " * 1000, b"- " * 2000, b"? " * 1000, b"9" * 5000, b"x" * 70_000, b"\n" * 3000,
]  # fmt: skip


def _bomb(rng: Random) -> bytes:
    """Aliases that double, level after level, in a place where they are looked at."""
    depth = rng.choice((3, 25, 60))
    levels = ["b0: &b0 [x, x]"] + [f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]" for i in range(1, depth)]
    place = rng.choice(
        ("method: {{name: *b{0}}}", "reward: *b{0}", "seed: *b{0}", "*b{0} : 1", "model: {{path: *b{0}}}")
    )
    return "\n".join([*levels, place.format(depth - 1)]).encode()


def _fields(kind: type[Any]) -> dict[str, Any]:
    """The types of a dataclass's fields, without their bounds."""
    return {field.name: get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}


def _sections() -> dict[str, list[dict[str, Any]]]:
    """The keys of each section with their types, '' holding those of none; of methods and rewards, several sets."""
    found: dict[str, list[dict[str, Any]]] = {"": [{}]}
    for name, kind in _fields(Config).items():
        if dataclasses.is_dataclass(kind):
            found[name] = [_fields(kind)]  # type: ignore[arg-type]
        elif name not in ("method", "reward"):
            found[""][0][name] = kind
    found["method"] = [{"name": Literal[name], **_fields(kind)} for name, kind in METHODS.items()]
    share = {"weight": float, "threshold": float}
    found["reward"] = [{"name": Literal[name], **share, **_fields(kind)} for name, kind in REWARDS.items()]
    return found


SECTIONS = _sections()


def _key(rng: Random) -> tuple[str, dict[str, Any], str]:
    """A section, its keys, and one of them."""
    section = rng.choice([*SECTIONS, "method", "method", "train", "memory"])
    keys = rng.choice(SECTIONS[section])
    return section, keys, rng.choice(list(keys))


def _plausible(rng: Random, kind: Any) -> Any:
    """A value of the type ``kind``, within its bounds as often as not."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return rng.choice(arguments)
    if type(None) in arguments and rng.random() < 0.3:
        return None
    if get_origin(kind) is tuple or list in arguments:
        return [_plausible(rng, arguments[0]) for _ in range(rng.randint(0, 4))]
    kind = arguments[0] if arguments else kind
    makers: dict[Any, Callable[[], Any]] = {
        bool: lambda: rng.random() < 0.5,
        int: lambda: rng.choice((0, 1, 2, 3, 4, 5, 8, 11, 32, 48, 1000)),
        float: lambda: rng.choice((0.0, 0.1, 0.3, 1.0, 2.5, 10 ** rng.uniform(-9, 9))),
        str: lambda: rng.choice(("embedded:base", "embedded:reward", "embedded:training_prompts.txt", "to_q", "x")),
    }
    return makers.get(kind, lambda: {})()


def _value(rng: Random, key: str, kind: Any) -> Any:
    if key == "function":
        return rng.choice(("math:sqrt", "math:pi", "math", ":", "math:", "..x:y", "no.such:thing", "operator:neg"))
    if rng.random() < 0.5:
        return _plausible(rng, kind)
    if rng.random() < 0.3:
        return rng.choice((rng.randint(1, 9), rng.random(), rng.randint(-(10**20), 10**20), 10 ** rng.uniform(-40, 40)))
    return rng.choice(SCALARS)


def _structure(rng: Random, values: dict[str, Any]) -> None:
    """Changes a key: another value, another name, a deeper place, or none."""
    section, keys, key = _key(rng)
    target = values if not section else values.setdefault(section, {})
    if not isinstance(target, dict):
        return
    if section in ("method", "reward") and rng.random() < 0.8:
        # Options of another kind would be refused for that alone.
        kept = target if target.get("name") in get_args(keys["name"]) else {}
        values[section] = target = {**kept, "name": get_args(keys["name"])[0]}
    change = rng.random()
    if change < 0.8:
        target[key] = _value(rng, key, keys[key])
    elif change < 0.85:
        target.pop(key, None)
    elif change < 0.95:
        target[rng.choice((key + "s", key.upper(), key[:-1], "", "name", 3, None, True))] = target.pop(key, 1)
    else:
        target[key] = {key: target.get(key, 1)}


def _dumped(values: dict[str, Any]) -> bytes:
    # Escaped: a lone surrogate has no bytes of its own.
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=False).encode("utf-8", "backslashreplace")


def _bytes(rng: Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(data) + 1)
        change = rng.random()
        if change < 0.3 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif change < 0.6:
            data[place:place] = rng.choice(TEXTS)
        elif change < 0.8:
            del data[place : place + rng.choice((1, 1, 4, 40))]
        else:
            end = place + rng.choice((1, 20, 200))
            data[place:place] = data[place:end]
    return bytes(data)


def config_text(rng: Random) -> bytes:
    """A config file: one of ours, half the time small enough to run, changed."""
    content = rng.choice(CONFIGS).read_bytes()
    values = yaml.safe_load(content)
    if rng.random() < 0.75:
        values = values | {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
        values["train"], values["samples"] = dict(TINY["train"]), dict(TINY["samples"])
        content = _dumped(values)
    kind = rng.random()
    if kind < 0.65:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _structure(rng, values)
        return _dumped(values)
    if kind < 0.9:
        return _bytes(rng, content)
    if kind < 0.95:
        return content + b"\n" + _bomb(rng)
    return content + b"\n" + content[rng.randrange(len(content)) :]


def assignments(rng: Random) -> list[str]:
    """Overrides, as they might stand on the command line."""
    found = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        section, keys, key = _key(rng)
        value = (
            yaml.safe_dump(_value(rng, key, keys[key]), default_flow_style=True, width=10**6)
            .removesuffix("\n...\n")
            .strip()
        )
        text = f"{section}.{key}={value}" if section else f"{key}={value}"
        if rng.random() < 0.2:
            text = _bytes(rng, text.encode()).decode("utf-8", "surrogateescape")
        if section == "method":
            found.append(f"method.name={get_args(keys['name'])[0]}")
        found.append(text)
    return found


LINES = [
    "a red circle",
    "two blue squares",
    "é☃",
    "a\u2028b",
    " ",
    "",
    "<script>alert(1)</script>",
    "x" * 3000,
    "\ufeff",
]


def _prompt(rng: Random) -> Any:
    return rng.choice(SCALARS) if rng.random() < 0.2 else rng.choice(LINES)


def _text_lines(rng: Random) -> bytes:
    lines = [line if isinstance(line := _prompt(rng), str) else "a circle" for _ in range(rng.randrange(20))]
    return rng.choice(("\n", "\r\n", "\n\n")).join(lines).encode("utf-8", "surrogatepass")


def _json_lines(rng: Random) -> bytes:
    records = [{"prompt": _prompt(rng), "tag": rng.choice(SCALARS)} for _ in range(rng.randrange(20))]
    return "\n".join(json.dumps(record, default=str) for record in records).encode()


def _parquet(rng: Random) -> bytes:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.string()
    kind = rng.choice((texts, texts, pyarrow.int64(), pyarrow.binary(), pyarrow.list_(texts)))
    make: dict[Any, Callable[[], Any]] = {
        texts: lambda: str(rng.choice(LINES)),
        pyarrow.int64(): lambda: rng.randrange(9),
        pyarrow.binary(): lambda: rng.choice(TEXTS),
    }
    rows = [rng.choice((None, make.get(kind, lambda: ["a"])())) for _ in range(rng.randrange(20))]
    names = rng.choice((["prompt"], ["prompt"], ["text"], ["prompt", "prompt"]))
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(rows, kind)] * len(names), names), file)
    return file.getvalue()


def prompt_file(rng: Random) -> tuple[str, bytes]:
    """The ending and the content of a prompt file."""
    makers = {".txt": _text_lines, ".jsonl": _json_lines, ".json": _json_lines, ".parquet": _parquet}
    suffix = rng.choice(list(makers))
    content = makers[suffix](rng)
    return suffix, _bytes(rng, content) if rng.random() < 0.6 else content


def unchanged(rng: Random) -> bytes:
    """A config file that is right, small enough to run half the time."""
    values = yaml.safe_load(rng.choice(CONFIGS).read_bytes())
    return _dumped(values | TINY if rng.random() < 0.75 else values)
