"""What safety hooks cost a token: processor time of a gateway that streams a fake engine's text.

    python benchmarks/bench_hooks.py [--tokens N] [--rounds N]

One gateway process a set of hooks, all before one fake engine; rounds take them in turn. The text
has numbers and short words in it, so that hooks find beginnings of matches, and no match.
"""

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer

import scalellm.demo

MODEL = Path(scalellm.demo.__file__).parent / "model"
TEXT = (
    "Once upon a time there was a little fox, who lived at 12 Wood Lane and wrote long letters to "
    "friends in May 1999 and June 2001. "
)
MANY = [f"word{n}x" for n in range(1000)]
HOOKS = {
    "none": "",
    "words, 3": '[[models.safety]]\nhook = "words"\nwords = ["falcon", "project x", "fox trot"]\n',
    "words, 1000": f'[[models.safety]]\nhook = "words"\nwords = {MANY}\n',
    "personal_data": '[[models.safety]]\nhook = "personal_data"\n',
    "limits": '[[models.safety]]\nhook = "limits"\nmax_repeats = 5000\n',
}


def python(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments])


def processor_us(pid: int) -> float:
    """Of all threads that live, so far."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e3


def stream(port: int, tokens: int) -> None:
    body = {"model": "m", "prompt": "x", "stream": True, "ignore_eos": True, "max_tokens": tokens}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse().read()
    if not answer.endswith(b"data: [DONE]\n\n"):
        raise SystemExit(answer[-500:].decode())


def wait_ready(port: int) -> None:
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("a gateway does not become ready")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    settings = {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_model_len": 2 * arguments.tokens,
        "output": {"kind": "fixed", "ids": ids},
        "ttft_ms": 0.0,
        "tbt_ms": 0.05,
    }
    with tempfile.TemporaryDirectory() as folder:
        engine = f"unix:{folder}/engine"
        run = (
            "import sys; from scalellm._core import run_fake_engine; run_fake_engine(*sys.argv[1:])"
        )
        started = [python(run, engine, json.dumps(settings))]
        gateways: dict[str, tuple[int, int]] = {}
        try:
            for number, (name, hooks) in enumerate(HOOKS.items()):
                port, file = free_port(), Path(folder) / f"{number}.toml"
                head = f'port = {port}\nlog_level = "error"\n[[models]]\nname = "m"\n'
                file.write_text(f'{head}path = "{MODEL}"\nreplicas = ["{engine}"]\n{hooks}')
                command = [sys.executable, "-m", "scalellm", "gateway", "--config", str(file)]
                started.append(subprocess.Popen(command))
                gateways[name] = (port, started[-1].pid)
                wait_ready(port)
            took: dict[str, list[float]] = {name: [] for name in HOOKS}
            for _ in range(arguments.rounds):
                for name, (port, pid) in gateways.items():
                    before = processor_us(pid)
                    stream(port, arguments.tokens)
                    took[name].append((processor_us(pid) - before) / arguments.tokens)
        finally:
            for process in started:
                process.terminate()
                process.wait()
    bare = statistics.median(took["none"])
    print("hooks            us of processor time a token, median (range); more than without")
    for name, values in took.items():
        middle = statistics.median(values)
        spread = f"({min(values):.2f} to {max(values):.2f})"
        print(f"{name:16} {middle:6.2f} {spread}  {middle - bare:+.2f}")


if __name__ == "__main__":
    main()
