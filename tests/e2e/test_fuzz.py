"""Damaged and strange inputs at the doors of data: each is read, or refused in one short line, soon and without remains.

Runs only when asked: ``PALATE_FUZZ=30 pytest -n 0 -s tests/e2e/test_fuzz.py`` tries 30 inputs at each door, about a minute;
``PALATE_FUZZ_SEED`` begins elsewhere. What failed is told with door and number, which make it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sqlite3
import tarfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from palate.base.errors import UserError

TRIES = int(os.environ.get("PALATE_FUZZ", "0"))
SEED = int(os.environ.get("PALATE_FUZZ_SEED", "0"))
LIMIT, LONGEST = 20, 400
"""Seconds that a door may take, and characters of a message without the path of the test's own folder."""

pytestmark = pytest.mark.skipif(not TRIES, reason="fuzzing: set PALATE_FUZZ to a number of inputs")

ODD = [
    None, True, False, 0, -1, 0.5, 1e308, -0.0, 2**70, float("nan"), float("inf"), "", " ", "nan", "null", "1", "1.0", "yes",
    "\0", "\ud800", "\u202e", "é" * 3, "../../etc/passwd", "/etc/passwd", "a\\b.png", "C:\\x.png", "x" * 5000, "QUJD" * 3000,
    "a\nb\rc",
    "http://x/y.png", "data:image/png;base64,AA==", "\U0001f600", [], {}, [[]], [None], [1, 2], {"bytes": None, "path": "x"},
    {"bytes": 3}, {"a": {"b": [1]}}, [[1, 2], [2, 1]], ["0.png", "1.png"], ["0.png"] * 40, "0.png", "[" * 3000, "}" * 50,
]  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "AVIF")


class HangError(Exception):
    """A door that did not come to an end."""


def picture(rng: random.Random, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def bitten(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, lost, doubled, cut off or put in."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        n = max(1, len(found))
        place, size = rng.randrange(n), rng.choice([1, 2, 8, 64, n // 3 + 1])
        kind = rng.randrange(6)
        if kind == 0:
            found[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del found[place : place + size]
        elif kind == 2:
            found[place:place] = found[place : place + size]
        elif kind == 3:
            del found[place:]
        elif kind == 4:
            found[place:place] = rng.choice(
                [b"\0", b"\xff", b'"', b"\n", b"{", b"[", b",", b"\xef\xbb\xbf", rng.randbytes(size)]
            )
        else:
            found[place : place + size] = rng.randbytes(len(found[place : place + size]))
    return bytes(found)


def strange(rng: random.Random, row: dict) -> dict:
    """A row with odd values, without some, or with other names."""
    row = dict(row)
    for _ in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice(list(row) or ["prompt"])
        kind = rng.randrange(5)
        if kind <= 1:
            row[name] = rng.choice(ODD)
        elif kind == 2:
            row.pop(name, None)
        elif kind == 3:
            row[rng.choice([name.upper(), f" {name}", "", "x" * 300, "label", "liked", "weight", "has_label"])] = rng.choice(
                ODD
            )
        else:
            row = dict(rng.sample(list(row.items()), len(row)))
    return row


ROWS = (
    {"prompt": "a", "chosen": "0.png", "rejected": "1.png", "weight": 1.0, "has_label": True},
    {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "label": 1, "rater": "eve"},
    {"caption": "a", "jpg_0": "0.png", "jpg_1": "1.png", "label_0": 1.0, "label_1": 0.0, "are_different": True},
    {"prompt": "a", "image_0": "0.png", "image_1": "1.png", "best_image_uid": "p", "image_0_uid": "p", "image_1_uid": "q"},
    {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "rankings": [[1, 2, 3], [3, 1, 2]]},
    {"prompt": "a", "generations": ["0.png", "1.png"], "ranking": [1, 2]},
    {"prompt": "a", "prompt_id": "7", "image_path": "0.png", "rank": 1},
    {"prompt": "a", "file_path": ["0.png", "1.png"], "human_preference": [1, 0]},
    {"prompt": "a", "image": "0.png", "liked": True},
)


def some_rows(rng: random.Random) -> list[dict]:
    row = rng.choice(ROWS)
    found = [dict(row) for _ in range(rng.choice([1, 2, 4]))]
    for _ in range(rng.choice([1, 1, 2])):
        i = rng.randrange(len(found))
        found[i] = strange(rng, found[i])
    return found


def as_jsonl(rng: random.Random, rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=rng.random() < 0.8).encode(errors="replace") + b"\n" for row in rows)


def read_all(folder: Path, source: Path) -> None:
    from palate.data.pairs import read

    del folder
    reader = read(source)
    for _ in reader:
        pass


# Doors: each makes an input in a folder of its own, and says what is done with it ----


def metadata(rng: random.Random, folder: Path) -> Callable[[], object]:
    data = as_jsonl(rng, some_rows(rng))
    name = rng.choice(["metadata.jsonl", "rankings.jsonl", "x.json", "x.jsonl"])
    if name == "x.json":
        data = b"[" + b",".join(data.split(b"\n")[:-1]) + b"]"
    (folder / name).write_bytes(bitten(rng, data) if rng.random() < 0.4 else data)
    return lambda: read_all(folder, folder if name in ("metadata.jsonl", "rankings.jsonl") else folder / name)


def table(rng: random.Random, folder: Path) -> Callable[[], object]:
    rows, delimiter = some_rows(rng), rng.choice(",,;\t|")
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [delimiter.join(names), *(delimiter.join(str(row.get(name, "")) for name in names) for row in rows)]
    data = "\n".join(lines).encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]), errors="replace")
    (folder / "x.csv").write_bytes(bitten(rng, data) if rng.random() < 0.4 else data)
    return lambda: read_all(folder, folder / "x.csv")


def parquet(rng: random.Random, folder: Path) -> Callable[[], object]:
    rows = some_rows(rng)
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row if name.isprintable()):
        values = [row.get(name) for row in rows]
        if rng.random() < 0.3:
            values = [
                (folder / v).read_bytes() if isinstance(v, str) and v.endswith(".png") and len(v) == 5 else v for v in values
            ]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
            columns[name] = pa.array([str(v).encode(errors="replace").decode() for v in values])
    path = folder / rng.choice(["x.parquet", "x.arrow"])
    made = pa.table(columns)
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, made.schema) as writer:
            writer.write_table(made)
    else:
        try:
            pq.write_table(made, path)
        except pa.ArrowNotImplementedError:  # an object without entries
            pq.write_table(made.select([f.name for f in made.schema if not pa.types.is_nested(f.type)]), path)
    if rng.random() < 0.5:
        path.write_bytes(bitten(rng, path.read_bytes()))
    return lambda: read_all(folder, path)


def shard(rng: random.Random, folder: Path) -> Callable[[], object]:
    path = folder / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            for end in ("jpg_0", "jpg_1", "txt", "label"):
                name, data = f"{i}.{end}", picture(rng) if "jpg" in end else b"1"
                if rng.random() < 0.15:
                    name = rng.choice(
                        [f"._{name}", name.upper(), "../x.png", f"{'d' * 90}/{name}", ".", f"{i}", f"{i}.json", f"é/{name}"]
                    )
                if rng.random() < 0.15:
                    data = rng.choice(
                        [b"", b"{", b"[1]", b"\xff\xfe", bitten(rng, data), b'{"label": "x"}', b'{"' + b"k" * 900 + b'": 1}']
                    )
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    if rng.random() < 0.5:
        path.write_bytes(bitten(rng, path.read_bytes()))
    return lambda: read_all(folder, path)


def captioned(rng: random.Random, folder: Path) -> Callable[[], object]:
    place = folder / "set"
    place.mkdir()
    for i in range(4):
        form = rng.choice(FORMATS)
        data = picture(rng, form)
        (place / f"{i}.{rng.choice([form.lower(), form, 'png', 'JPG', 'heic', 'x'])}").write_bytes(bitten(rng, data))
        text = rng.choice([b"a prompt", b"", b"\xff\xfe\0", b"x" * 9000, b"a\nb", "é".encode("latin-1")])
        (place / f"{i}.{rng.choice(['txt', 'TXT', 'caption', 'json'])}").write_bytes(text)
    return lambda: read_all(folder, place)


def pictures(rng: random.Random, folder: Path) -> Callable[[], object]:
    for i, form in enumerate(rng.choices(FORMATS, k=2)):
        (folder / f"{i}.png").write_bytes(bitten(rng, picture(rng, form)))
    (folder / "x.jsonl").write_bytes(as_jsonl(rng, [dict(ROWS[0])]))
    return lambda: read_all(folder, folder / "x.jsonl")


def yaml(rng: random.Random, folder: Path) -> Callable[[], object]:
    from palate.runs.library import built_in
    from palate.runs.recipe import load

    text = rng.choice(list(built_in().values())).read_bytes()
    lines = text.split(b"\n")
    if rng.random() < 0.6:
        i = rng.randrange(len(lines))
        head, _, _ = lines[i].partition(b":")
        lines[i] = head + b": " + json.dumps(rng.choice(ODD)).encode()
    text = b"\n".join(lines)
    (folder / "x.yaml").write_bytes(bitten(rng, text) if rng.random() < 0.5 else text)
    return lambda: load(str(folder / "x.yaml"))


def prompts(rng: random.Random, folder: Path) -> Callable[[], object]:
    from palate.names.prompts import find_prompts

    row = {"prompt": "a", "negative": "b", "metadata": {"c": 1}, "category": "d"}
    data = rng.choice(
        [b"a\nb\n", as_jsonl(rng, [row, strange(rng, row)]), "é\n".encode("utf-16"), b"[1, 2]", b"prompt,x\na,b\n"]
    )
    path = folder / rng.choice(["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "p", "PartiPrompts.tsv"])
    path.write_bytes(bitten(rng, data) if rng.random() < 0.6 else data)
    published = rng.choice(["", "", "", "drawbench:", "partiprompts:", "geneval:", "pickapic:", "hpsv2:"])
    return lambda: find_prompts(f"{published}{path}")


def manifest(rng: random.Random, folder: Path) -> Callable[[], object]:
    from palate.evaluation.manifest import read_side

    rows = [{"file": f"{i}.png", "prompt": "a", "seed": i, "index": 0, "model": "m", "metadata": {"c": "d"}} for i in range(3)]
    rows[0] = strange(rng, rows[0])
    data = as_jsonl(rng, rows)
    (folder / "manifest.jsonl").write_bytes(bitten(rng, data) if rng.random() < 0.4 else data)
    if rng.random() < 0.3:
        (folder / "settings.json").write_bytes(bitten(rng, b'{"steps": 3, "seed": 1}'))
    return lambda: read_side(folder)


def scores(rng: random.Random, folder: Path) -> Callable[[], object]:
    """What ``palate score`` makes of a folder that was scored before."""
    rows = [{"file": f"{i}.png", "prompt": "a", "seed": i} for i in range(3)]
    (folder / "manifest.jsonl").write_bytes(as_jsonl(rng, rows))
    (folder / "scores").mkdir()
    head = {"judge": "jpeg_compressibility", "kind": "jpeg_compressibility", "fingerprint": "x", "role": "held out"}
    told = [head, *({"file": f"{i}.png", "score": 0.5, "of": "00"} for i in range(3))]
    told[rng.randrange(4)] = strange(rng, told[rng.randrange(4)])
    data = as_jsonl(rng, told)
    (folder / "scores" / "x.jsonl").write_bytes(bitten(rng, data) if rng.random() < 0.6 else data)
    if rng.random() < 0.5:
        (folder / f"{rng.randrange(3)}.png").write_bytes(bitten(rng, picture(rng, rng.choice(FORMATS))))

    def work() -> None:
        from palate.cli import main
        from palate.evaluation.manifest import read_scores, read_side

        code = main(["score", str(folder), "--judges", "[jpeg_incompressibility]"])
        written = folder / "scores" / "jpeg_incompressibility.jsonl"
        assert code in (0, 2)
        assert code == 2 or len(read_scores(written).scores) > 0
        read_side(folder)

    return work


def labels(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Two commands over the same data; an output appears whole or not at all."""
    (folder / "x.jsonl").write_bytes(as_jsonl(rng, some_rows(rng)))
    if rng.random() < 0.3:
        (folder / "0.png").write_bytes(bitten(rng, picture(rng, rng.choice(FORMATS))))

    def work() -> None:
        from palate.cli import main
        from palate.data.pairs import read_pairs

        out = folder / "out.parquet"
        judges = ["--judges", "[jpeg_compressibility]"]
        code = main(["label", str(folder / "x.jsonl"), *judges, "--output", str(out), "--max_bad_rows", "1"])
        assert (code == 0) == out.exists()
        if code == 0:
            list(read_pairs(out, ties="keep"))
        told = folder / "told.json"
        code = main(["accuracy", str(folder / "x.jsonl"), *judges, "--output", str(told)])
        assert (code == 0) == told.exists()
        if code == 0:
            json.loads(told.read_text())

    return work


def options(rng: random.Random, folder: Path) -> Callable[[], object]:
    from palate.runs.recipe import OPTIONS, load

    del folder
    name = rng.choice(list(OPTIONS))
    value = rng.choice([str(v) for v in ODD] + ["none", "null", "[]", "1e-4", "[a, b]", "{a: 1}"])
    return lambda: load("miniature-dpo", {name: value})


def votes(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A database of votes with odd values, or damaged, as data, and as what the page has collected."""
    from palate.votes import exchange, share
    from palate.votes.store import Store

    del exchange, share  # imported before time is taken
    (study := folder / "study").mkdir()
    for i in range(3):
        (study / f"{i}.png").write_bytes(picture(rng))
    store = Store(study)
    numbers = [store.add_picture(f"{i}.png", "a", seed=i, number=0, model=f"m{i}", metadata={}) for i in range(3)]
    rater, _ = store.add_rater("eve", None)
    for pair in ((0, 1), (1, 2)):
        showing = store.add_showing(rater, (numbers[pair[0]], numbers[pair[1]]), arrangement=0, repeat=False, mode="compare")
        store.add_vote(f"{pair}", showing, "overall", rng.choice(["first", "second", "tie"]), 1.0)
    store.close()
    path = study / "votes.db"
    if rng.random() < 0.6:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA ignore_check_constraints = ON")
        tables = {"pictures": "file prompt seed model metadata", "raters": "public name", "showings": "picture_0 rater mode"}
        table, columns = rng.choice([*tables.items(), ("votes", "choice question seconds showing undone")])
        value = rng.choice([v for v in ODD if not isinstance(v, list | dict | bool) and v not in (2**70, "\ud800")])
        with contextlib.suppress(sqlite3.IntegrityError):
            connection.execute(f"UPDATE {table} SET {rng.choice(columns.split())} = ?", (value,))
        connection.commit()
        connection.close()
    if rng.random() < 0.5:
        path.write_bytes(bitten(rng, path.read_bytes()))

    def work() -> None:
        from palate.cli import main

        for kind, name in (("export", "out.jsonl"), ("results", "out.html")):
            code = main(["vote", kind, str(study), "--output", str(folder / name)])
            assert code in (0, 2)
            assert (code == 0) == (folder / name).exists()
        read_all(folder, path)

    return work


COMMANDS = {
    "generate mini-sd": {"prompts": "p.txt", "num_inference_steps": "1", "output_dir": "drawn", "resolution": "64"},
    "score .": {"judges": "[jpeg_compressibility]"},
    "label x.jsonl": {"judges": "[jpeg_compressibility]", "output": "new.parquet"},
    "accuracy x.jsonl": {"judges": "[jpeg_compressibility]", "output": "told.json"},
    "compare a b": {"output": "compared.html"},
    "export nothing": {"format": "kohya", "output": "k.safetensors"},
    "evaluate nothing": {"num_evaluation_prompts": "1"},
    "report nothing": {},
    "train miniature-dpo": {"train_data": "nothing", "max_train_steps": "1"},
    "train miniature-ddpo-is": {"rounds": "1", "train_prompts": "nothing"},
    "vote export nothing": {"output": "v.jsonl"},
    "recipes show": {},
    "serve-judge nothing": {},
}


def verbs(rng: random.Random, folder: Path) -> Callable[[], object]:
    """A whole command with odd words, options or values."""
    (folder / "p.txt").write_text("a\n")
    (folder / "x.jsonl").write_bytes(as_jsonl(rng, [dict(ROWS[0])]))
    rows = [{"file": f"{i}.png", "prompt": "a", "seed": i} for i in range(3)]
    (folder / "manifest.jsonl").write_bytes(as_jsonl(rng, rows))
    command, options = rng.choice(list(COMMANDS.items()))
    given, words = dict(options), command.split()
    odd = [str(v) for v in ODD if "\0" not in str(v)] + [
        "none",
        "null",
        "[]",
        "[a, b]",
        "{a: 1}",
        "1e309",
        "-5",
        "~",
        "/proc/x",
    ]
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(4)
        if kind == 0 and len(words) > 1:
            words[-1] = rng.choice(odd)
        elif kind == 1 or not given:
            given[rng.choice(["seed", "batch_size", "num_inference_steps", "x" * 400, "", "output_dir", "help"])] = rng.choice(
                odd
            )
        else:
            given[rng.choice(list(given))] = rng.choice(odd)

    def work() -> None:
        from palate.cli import main

        os.chdir(folder)
        try:
            code = main([*words, *(word for name, value in given.items() for word in (f"--{name}", value))])
        finally:
            os.chdir(folder.parent)
        assert code in (0, 2)

    return work


DOORS = (metadata, table, parquet, shard, captioned, pictures, yaml, prompts, manifest, scores, labels, options, votes, verbs)


def hang(*_: object) -> None:
    raise HangError


def tried(door: Callable, number: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """How a door took one input, and what it said."""
    rng = random.Random(f"{door.__name__} {SEED} {number}")
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(picture(rng))
    work, said, outcome = door(rng, folder), "", "read"
    capsys.readouterr()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT)
    try:
        work()
    except UserError as error:
        outcome, said = "refused", str(error)
    except HangError:
        return "hung", ""
    except AssertionError:
        return "half-written", traceback.format_exc()
    except Exception:
        return "raised", traceback.format_exc()
    finally:
        signal.alarm(0)
    spoken = capsys.readouterr().err
    outcome = "refused" if "error: " in spoken else outcome
    lines = [said, *spoken.splitlines()]
    if "\n" in said or spoken.count("error: ") > 2:
        return "several lines", said + spoken
    if too_long := [line for line in lines if len(line.replace(str(folder), "")) > LONGEST]:
        return "too long", too_long[0]
    if left := [p.name for p in folder.rglob("*") if p.name.endswith(".tmp")]:
        return "half-written", str(left)
    return outcome, said


@pytest.mark.parametrize("door", DOORS, ids=[door.__name__ for door in DOORS])
@pytest.mark.filterwarnings("ignore")
def test_every_input_is_read_or_refused(door, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")
    counts, failed, began = Counter(), [], time.monotonic()
    for number in range(TRIES):
        outcome, said = tried(door, number, tmp_path / str(number), capsys)
        counts[outcome] += 1
        if outcome not in ("read", "refused"):
            failed.append(f"{door.__name__} {number}: {outcome}\n{said[:200]} ... {said[-1200:]}")
    with capsys.disabled():
        print(f"\n{door.__name__}: {dict(counts)} in {time.monotonic() - began:.0f} s")
    shown = "\n\n".join(failed[:5])
    assert not shown, shown
