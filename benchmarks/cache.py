"""What the cache of encoded pictures costs, beside other stores; and what starts from it.

    python benchmarks/cache.py stores      one file an entry, LMDB (pip install lmdb), safetensors shards, Palate's Arrow shards
    python benchmarks/cache.py warm        the start on 100 and 10,000 pairs that are encoded already
    python benchmarks/cache.py million     the same on a million pairs, of tiny entries
    python benchmarks/cache.py processes   the pictures that each of one, two and four processes encodes
    python benchmarks/cache.py precision   what 16 bits change in latents, beside what a picture's own 8 bits leave open

Each prints a table and puts it into benchmarks/cache.json. Processor time, where a column is not called otherwise; stores are
interleaved. Runs on a CPU, one thread a process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save, save_file

from palate.base.shapes import Shape
from palate.data.cache import AT_ONCE, TensorCache
from palate.data.encode import Encoders, encode
from palate.data.items import Columns, EncodedPair, Items
from palate.data.pairs import read_pairs
from palate.data.remembered import remember

RESULTS = Path(__file__).with_suffix(".json")
Rows = list[dict[str, object]]


# Stores -------------------------------------------------------------------------------------------------------------------


class Files:
    """A safetensors file an entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, key: str, value: bytes) -> None:
        path = self.folder / key[:2] / key
        path.parent.mkdir(exist_ok=True, parents=True)
        path.with_suffix(".tmp").write_bytes(value)
        os.replace(path.with_suffix(".tmp"), path)

    def has(self, key: str) -> bool:
        return (self.folder / key[:2] / key).exists()

    def get(self, key: str) -> object:
        return _checked((self.folder / key[:2] / key).read_bytes())

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Lmdb:
    """LMDB: a transaction for 64 entries, as the shards write them; not synced to disk, as they are not."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        folder.mkdir(exist_ok=True)
        self.base = lmdb.open(str(folder), map_size=2**36, sync=False)
        self.pending: list[tuple[bytes, bytes]] = []

    def put(self, key: str, value: bytes) -> None:
        self.pending.append((bytes.fromhex(key), value))
        if len(self.pending) == 64:
            self.flush()

    def flush(self) -> None:
        with self.base.begin(write=True) as work:
            for key, value in self.pending:
                work.put(key, value)
        self.pending = []

    def has(self, key: str) -> bool:
        with self.base.begin() as work, work.cursor() as cursor:
            return cursor.set_key(bytes.fromhex(key))

    def get(self, key: str) -> object:
        with self.base.begin() as work:
            return _checked(work.get(bytes.fromhex(key)))

    def close(self) -> None:
        self.base.close()


class Safetensors:
    """Shards of a thousand entries, which only appear when they are complete; names are read from their headers."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder, self.pending = folder, {}
        folder.mkdir(exist_ok=True)
        self.where = {}
        for path in folder.glob("*.safetensors"):
            shard = safe_open(path, "pt")
            self.where |= dict.fromkeys(shard.keys(), shard)

    def put(self, key: str, value: bytes) -> None:
        self.pending[key] = load(value)["latents"]
        if len(self.pending) == 1000:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            save_file(self.pending, self.folder / f"{next(iter(self.pending))}.safetensors")
            self.pending = {}

    def has(self, key: str) -> bool:
        return key in self.where

    def get(self, key: str) -> object:
        tensor = self.where[key].get_tensor(key)
        zlib.crc32(tensor.numpy())
        return tensor

    def close(self) -> None:
        self.where = {}


class Arrow:
    """Palate's: checked when read."""

    def __init__(self, folder: Path) -> None:
        self.cache = TensorCache(folder)

    def put(self, key: str, value: bytes) -> None:
        self.cache.put(key, load(value))

    def has(self, key: str) -> bool:
        return self.cache.has(key)

    def get(self, key: str) -> object:
        return self.cache.get(key)

    def flush(self) -> None:
        self.cache.flush()

    def close(self) -> None: ...


def _checked(value: bytes) -> dict[str, torch.Tensor]:
    """As much work as telling a damaged entry takes."""
    zlib.crc32(value)
    return load(value)


STORES = {"file an entry": Files, "LMDB": Lmdb, "safetensors shards": Safetensors, "Arrow shards (Palate)": Arrow}


def stores(folder: Path, entries: int = 10_000, repeats: int = 3) -> Rows:
    """Entries of 32 KB: latents of SD at 512 pixels with 16 bits."""
    value = save({"latents": torch.randn(4, 64, 64).half()})
    keys = [TensorCache.key(entry=i) for i in range(entries)]
    order = np.random.default_rng(0).permutation(entries)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in STORES}
    told: dict[str, dict[str, object]] = {}
    for turn in range(repeats):
        for name, kind in STORES.items():
            place = folder / f"{name.split()[0]}-{turn}"
            store = kind(place)

            def write(store=store) -> None:
                for key in keys:
                    store.put(key, value)
                store.flush()

            def took(what: str, work: Callable[[], object], name: str = name) -> object:
                began = time.process_time()
                result = work()
                taken[name].setdefault(what, []).append(time.process_time() - began)
                return result

            took("write", write)
            store.close()
            store = took("open", lambda kind=kind, place=place: kind(place))
            assert took("ask for all", lambda store=store: all(store.has(key) for key in keys))
            took("read all, shuffled", lambda store=store: [store.get(keys[i]) for i in order])
            files = [path for path in place.rglob("*") if path.is_file()]
            size = sum(path.stat().st_blocks * 512 for path in files) / (entries * len(value))
            told[name] = {"files": len(files), "disk / values": round(size, 3)}
            store.close()
            shutil.rmtree(place)
    return [
        {"store": name, **{f"{what}, s": round(min(found), 3) for what, found in taken[name].items()}, **told[name]}
        for name in STORES
    ]


# Starting -----------------------------------------------------------------------------------------------------------------


def encoders() -> Encoders:
    """Never called: all is encoded."""

    def none(*_: object) -> dict[str, torch.Tensor]:
        raise AssertionError("something is encoded again")

    return Encoders(none, none, "vae", "text", none)


START = """
import json, resource, sys, time
began, used = time.perf_counter(), time.process_time()
import torch
from benchmarks.cache import encoders
from palate.base.shapes import Shape
from palate.data.cache import TensorCache
from palate.data.encode import encode
from palate.data.pairs import read_pairs
imported = time.process_time()
reader = read_pairs(sys.argv[1])
encoded = encode(reader, encoders(), cache=TensorCache(sys.argv[2]), shapes=[Shape(64, 64)], progress=False)
encoded, held_out = encoded.without_ties().split(0.05, 0)
order = encoded.order(0, 0)
batch = encoded.batch(order[:4], torch.arange(4))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"pairs": len(encoded) + len(held_out), "imports, s": round(imported - used, 2),
    "to the first batch, s": round(time.process_time() - imported, 2),
    "on the clock, s": round(time.perf_counter() - began, 2), "peak memory, MB": peak // 1024}))
"""


def started(data: Path, cache: Path) -> dict[str, object]:
    own = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", START, data, cache], env=own, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def filled(folder: Path, pairs: int, entry: torch.Tensor) -> tuple[Path, Path]:
    """A parquet file of made-up pairs, and a cache that holds their entries; each prompt belongs to fifteen of them, as in
    Pick-a-Pic."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, cache = folder / f"{pairs}.parquet", TensorCache(folder / f"cache-{pairs}")
    schema = pa.schema([("prompt", pa.string()), ("chosen", pa.binary()), ("rejected", pa.binary())])
    columns, text, values = Columns(), "", {name: save({name: entry}) for name in ("latents", "embeds")}

    def put(name: str, *parts: object) -> str:
        key = hashlib.sha256(repr(parts).encode()).digest()
        cache._pending[key] = values[name]  # as put does, of a tensor that is the same every time
        if len(cache._pending) == AT_ONCE:
            cache.flush()
        return key.hex()

    with pq.ParquetWriter(data, schema) as file:
        for start in range(0, pairs, 10_000):
            rows = range(start, min(pairs, start + 10_000))
            prompts = [f"a picture of number {i // 15}, in the style of nobody in particular" for i in rows]
            pictures = [[f"{side} {i}".encode() for i in rows] for side in ("w", "l")]
            file.write_table(pa.table([prompts, *pictures], schema))
            for i, prompt in zip(rows, prompts, strict=True):
                if i % 15 == 0:
                    text = put("embeds", i)
                keys = [put("latents", side, i) for side in ("w", "l")]
                columns.add(
                    EncodedPair(prompt, text, (keys[0],), (keys[1],), 1.0, 1.0, f"{data.name}, row {i + 1}", Shape(64, 64))
                )
    cache.flush()
    reader = read_pairs(data)
    from palate.data.encode import _Work

    work = _Work(encoders(), cache, [Shape(64, 64)], False, True, torch.float32, 8, 0)
    remember(cache, str(work.name_of(reader)), Items(columns.tensors()), reader)
    return data, cache.folder


def warm(folder: Path) -> Rows:
    made = [filled(folder, pairs, torch.zeros(4, 16, 16)) for pairs in (100, 10_000)]
    return [started(*one) for one in made]


def million(folder: Path) -> Rows:
    return [started(*filled(folder, 10**6, torch.zeros(4, 2, 2)))]


# Encoding -----------------------------------------------------------------------------------------------------------------


def processes(folder: Path, pairs: int = 240) -> Rows:
    """Of the miniature world, its own VAE and text encoder; the processor time of all that encoding does, reading included."""
    from palate.miniature import world
    from palate.models.families import load_denoiser

    made = load_denoiser(str(world.checkpoint("mini-sd"))).encoders()
    rows: Rows = []
    for count in (1, 2, 4):
        used = []
        for index in range(count):
            reader = read_pairs(world.find_pairs("miniature-pairs"), max_train_samples=pairs)
            began = time.process_time()
            cache = TensorCache(folder / str(count))
            encode(reader, made, cache=cache, shapes=[Shape(64, 64)], progress=False, part=(index, count))
            used.append(time.process_time() - began)
        alone = float(str(rows[0]["longest, s"])) if rows else max(used)
        rows.append({"parts": count, "longest, s": round(max(used), 2), "times as fast": round(alone / max(used), 2)})
    return rows


def precision(_: Path, pairs: int = 32) -> Rows:
    """Of the miniature's pictures and VAE: root mean square, over the standard deviation of latents."""
    from palate.data.images import decode, framed
    from palate.miniature import world
    from palate.models.families import load_denoiser

    made = load_denoiser(str(world.checkpoint("mini-sd"))).encoders()
    found = read_pairs(world.find_pairs("miniature-pairs"), max_train_samples=pairs)
    pixels = torch.stack([framed(decode(data), Shape(64, 64)) for pair in found for data in pair.pictures])
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    with torch.no_grad():
        latents, other = made.encode_images(pixels), made.encode_images(pixels + noise / 127.5)
    changes = {"fp16": latents.half().float(), "bf16": latents.bfloat16().float(), "half a level of 8 bits": other}
    return [
        {"change": name, "share": f"{((changed - latents).square().mean().sqrt() / latents.std()).item():.2e}"}
        for name, changed in changes.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--folder", help="where to write meanwhile; a temporary folder unless given")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = CASES[given.what](Path(folder))
    told = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    told[given.what] = {"command": f"python benchmarks/cache.py {given.what}", "machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for line in (names, *([str(row.get(name, "")) for name in names] for row in rows)):
        print("  ".join(cell.rjust(max(len(names[i]), 12)) for i, cell in enumerate(line)))


CASES: dict[str, Callable[[Path], Rows]] = {
    "stores": stores,
    "warm": warm,
    "million": million,
    "processes": processes,
    "precision": precision,
}

if __name__ == "__main__":
    main()
