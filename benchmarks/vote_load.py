"""Many raters at once, and the server killed in the middle: is every acknowledged vote there, once, and how long does it take?

    python benchmarks/vote_load.py [--raters 200] [--votes 50] [--kills 1] [--pause 0]

Loopback only. Every rater is a thread with a connection of its own that votes as soon as the answer to its last vote is there
(or about ``--pause`` seconds later), waits a second after a refusal for haste, and sends a vote again, under the same name, as
long as no answer came. Prints one JSON object; exits with 1 if a vote was lost or counted twice.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def pictures(folder: Path, pairs: int) -> None:
    """``pairs`` prompts, one small picture of each by two models."""
    for model in ("a", "b"):
        (folder / model).mkdir(parents=True)
        lines = []
        for i in range(pairs):
            Image.new("RGB", (8, 8), (i % 256, i // 256, 99)).save(folder / model / f"{i}.png")
            lines.append({"file": f"{i}.png", "prompt": f"prompt {i}", "seed": i, "index": 0, "model": model})
        (folder / model / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Server:
    def __init__(self, folder: Path, raters_per_pair: int) -> None:
        self.words = [sys.executable, "-m", "palate", "vote", str(folder), "--raters", str(raters_per_pair)]
        self.words += ["--questions", "overall", "--repeats", "0", "--port"]
        self.port = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([*self.words, str(self.port)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.port = int([self.process.stdout.readline() for _ in range(4)][1].rstrip("/\n").rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Rater(threading.Thread):
    """Votes ``count`` times, every other time left; notes what was acknowledged and how long each answer took."""

    def __init__(self, server: Server, number: int, count: int, pause: float) -> None:
        super().__init__()
        self.server, self.number, self.count, self.pause = server, number, count, pause
        self.cookie, self.form, self.connection = "", "", None
        self.acknowledged: list[str] = []
        self.seconds: list[float] = []
        self.retried = self.slowed = 0
        self.failed = ""

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        """The answer, however often it takes."""
        for _ in range(200):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
                headers = {"Cookie": self.cookie, "X-Palate": self.form, "Content-Type": "application/json"}
                self.connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = self.connection.getresponse()
                data = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError):
                self.connection = None
                self.retried += 1
                time.sleep(0.25)
                continue
            if answer.status == 429:
                self.slowed += 1
                time.sleep(1)
                continue
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status} {data}")
            if cookie := answer.getheader("set-cookie"):
                self.cookie = cookie.partition(";")[0]
            return data
        raise RuntimeError(f"{path}: no answer")

    def run(self) -> None:
        try:
            self.form = self.ask("GET", "/api/state")["form"]
            self.ask("POST", "/api/join", {"name": str(self.number)})
            state = self.ask("GET", "/api/state")
            self.form = state["form"]
            for turn in range(self.count):
                time.sleep(self.pause * random.uniform(0.5, 1.5))
                name = f"rater{self.number:04d}-{turn:04d}"
                body = {"vote": name, "showing": state["open"][0]["id"], "question": "overall"}
                began, slowed, retried = time.perf_counter(), self.slowed, self.retried
                state = self.ask("POST", "/api/vote", {**body, "choice": ("1", "2")[turn % 2], "seconds": 0.5})
                if (slowed, retried) == (self.slowed, self.retried):  # an answer, not a wait for a server that was killed
                    self.seconds.append(time.perf_counter() - began)
                self.acknowledged.append(name)
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"


def run(folder: Path, raters: int, votes: int, kills: int = 1, pause: float = 0.0) -> dict:
    """What became of ``raters * votes`` votes while the server was killed ``kills`` times."""
    raters_per_pair = 5
    # Raters hold a few pairs ahead: with as many again as are needed, nobody waits for others.
    pictures(folder, max(votes * 2, 2 * raters * votes // raters_per_pair))
    server = Server(folder, raters_per_pair)
    crowd = [Rater(server, number, votes, pause) for number in range(raters)]
    began = time.perf_counter()
    try:
        for rater in crowd:
            rater.start()
        for kill in range(1, kills + 1):
            while sum(len(r.acknowledged) for r in crowd) < raters * votes * kill / (kills + 1) and any(
                r.is_alive() for r in crowd
            ):
                time.sleep(0.02)
            server.kill()
            server.start()
        for rater in crowd:
            rater.join()
    finally:
        server.kill()
    taken = time.perf_counter() - began
    acknowledged = [name for rater in crowd for name in rater.acknowledged]
    connection = sqlite3.connect(folder / "votes.db")
    kept = [row[0] for row in connection.execute("SELECT id FROM votes WHERE undone = 0")]
    twice = connection.execute(
        "SELECT count(*) FROM (SELECT 1 FROM votes JOIN showings ON showings.id = showing WHERE undone = 0 "
        "GROUP BY rater, picture_0, picture_1, question HAVING count(*) > 1)"
    ).fetchone()[0]
    busiest = connection.execute(
        "SELECT max(n) FROM (SELECT count(DISTINCT rater) AS n FROM votes JOIN showings ON showings.id = showing "
        "GROUP BY picture_0, picture_1)"
    ).fetchone()[0]
    connection.close()
    times = np.array([s for rater in crowd for s in rater.seconds]) * 1000
    return {
        "raters": raters,
        "votes": raters * votes,
        "acknowledged": len(acknowledged),
        "lost": len(set(acknowledged) - set(kept)),
        "counted_twice": twice + len(kept) - len(set(kept)),
        "never_asked_for": len(set(kept) - set(acknowledged)),
        "most_raters_of_a_pair": busiest,
        "kills": kills,
        "pause": pause,
        "sent_again": sum(r.retried for r in crowd),
        "slowed_down": sum(r.slowed for r in crowd),
        "failed": [r.failed for r in crowd if r.failed],
        "seconds": round(taken, 1),
        "answer_ms": {f"p{q}": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", type=int, default=200)
    parser.add_argument("--votes", type=int, default=50)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--pause", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), options.raters, options.votes, options.kills, options.pause)
    print(json.dumps(found, indent=2))
    return int(bool(found["lost"] or found["counted_twice"] or found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
