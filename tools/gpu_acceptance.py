"""Accept a GPU machine: every part of the project that meets the device, in one command.

    python tools/gpu_acceptance.py --minutes 10 --out build/gpu-check        (make gpu-check)
    python tools/gpu_acceptance.py --list
    python tools/gpu_acceptance.py --only head speed
    python tools/gpu_acceptance.py --device cpu                              what of it can run without a GPU, tiny

Each section of tools/gpu_sections.py runs as a process of its own, so that neither an error of the device nor a hang
takes another section along. Its checks are printed as they end, and a table at the end. Its time limit is its share of
the minutes that are left, so what one section does not use the later ones may; over it the section is killed, with all
that it started.

OUT/results.jsonl has a line for each section with its checks, OUT/SECTION.log what it printed. Status: 0 all passed, 1
a check failed or a section was killed, 2 a mistake in what was asked for. A check that cannot run here (one GPU, no
compute-sanitizer) is reported as not tested, and fails nothing.

With --device cpu the maths runs on the stand-in of tests/gpu_stand_in.py and ranks talk through gloo: it tests this
command, not the machine. Declined: pytest for all of it, whose fixtures, order and time limits are about one process.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MEASURED_BY = [sys.executable, "-m", "tools.gpu_sections"]


class Section(NamedTuple):
    """A process that checks something."""

    share: float
    """Of the time, against those of the other sections."""
    about: str
    command: Sequence[str] = MEASURED_BY
    """Given the section's name, --device and --out. Writes a JSON line for each check to OUT/SECTION.jsonl."""


SECTIONS = {
    "machine": Section(1, "driver, compute capability, libraries, the doctor, one kernel"),
    "tests": Section(3, "tests/gpu; small kernels under compute-sanitizer"),
    "head": Section(1, "loss and gradients against float64 on the CPU: selections, sparse, bf16, regularisers"),
    "collectives": Section(1, "a world of one rank: every collective and dtype, no rows, objects, checkpoints, gloo"),
    "training": Section(4, "the demo under ZeRO 0 to 3, bf16, fp16; SIGTERM, resume, evaluate --verify"),
    "steps": Section(2, "waits and launches of BN-Inception and of heads against limits; time and busy share"),
    "speed": Section(4, "the head at 1 and 10 million classes, fused or not, at two budgets"),
    "large": Section(2, "more than 2^31 numbers, classes at the end of them, against the CPU"),
    "memory": Section(1, "peak memory of heads against the plan"),
    "ranks": Section(2, "1 rank against 2, with batch norm; one rank killed, resumed"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; returns the exit status."""
    given = parser().parse_args(arguments)
    if given.list:
        for name, section in SECTIONS.items():
            print(f"{name:<12} {section.about}")
        return 0
    if given.minutes <= 0:
        print(f"error: expected --minutes above 0, got {given.minutes:g}", file=sys.stderr)
        return 2
    names = [name for name in SECTIONS if name in (given.only or SECTIONS)]
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    results = []
    with open(given.out / "results.jsonl", "w", encoding="utf-8") as file:
        for number, name in enumerate(names):
            shares = [SECTIONS[other].share for other in names[number:]]
            limit = max(1.0, (deadline - time.monotonic()) * shares[0] / sum(shares))
            print(f"{name}: {SECTIONS[name].about} (at most {limit:.0f} s)", flush=True)
            result = run_section(name, device=given.device, out=given.out, limit=limit)
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
    print(f"\n{table(results)}")
    print(f"\n{given.out / 'results.jsonl'} has the numbers, {given.out}/SECTION.log what a section printed")
    return int(any(result["status"] not in ("passed", "not tested") for result in results))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all sections together (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--list", action="store_true", help="say what the sections check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tests this command, tiny")
    return parser


def run_section(name: str, *, device: str, out: Path, limit: float) -> dict[str, Any]:
    """Run a section for at most `limit` seconds, print its checks as they end, and say what became of them."""
    checks_file, log = (out / f"{name}{suffix}" for suffix in (".jsonl", ".log"))
    checks_file.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [*SECTIONS[name].command, name, "--device", device, "--out", str(out.absolute())]
    start, shown, is_killed = time.monotonic(), 0, False
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not is_killed:
                try:
                    process.wait(min(0.5, max(0.0, start + limit - time.monotonic())))
                except subprocess.TimeoutExpired:
                    is_killed = time.monotonic() >= start + limit
                shown = show(checks_file, shown)
        finally:
            end_group(process)
    show(checks_file, shown)
    checks = read(checks_file)
    statuses = {check["status"] for check in checks}
    text = ", ".join(check["name"] for check in checks if check["status"] == "failed")
    if is_killed:
        status, text = "killed", "; ".join(filter(None, [f"over its time limit of {limit:.0f} s", text]))
    elif "failed" in statuses:
        status = "failed"
    elif process.returncode or not checks:
        status, text = "failed", f"ended with status {process.returncode}: {last_line(log)}"
    else:
        status = "passed" if "passed" in statuses else "not tested"
        text = checks[0]["text"] if status == "not tested" else ""
    seconds = round(time.monotonic() - start, 1)
    return {"section": name, "status": status, "seconds": seconds, "text": text, "checks": checks}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a section started and left behind, and itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def read(checks_file: Path) -> list[dict[str, Any]]:
    """The checks that have ended; a line that is being written is not there yet."""
    if not checks_file.exists():
        return []
    lines = checks_file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def show(checks_file: Path, shown: int) -> int:
    """Print the checks that have ended since; returns how many are printed now."""
    checks = read(checks_file)
    for check in checks[shown:]:
        print(f"  {check['status']:<11}{check['seconds']:>7.1f} s  {check['name']:<34} {check['text']}", flush=True)
    return len(checks)


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def table(results: list[dict[str, Any]]) -> str:
    """A line for each section."""
    lines = [f"{'section':<12} {'status':<11}{'seconds':>8}  {'passed':>6} {'failed':>6} {'not tested':>10}  "]
    for result in results:
        found = [check["status"] for check in result["checks"]]
        counts = f"{found.count('passed'):>6} {found.count('failed'):>6} {found.count('not tested'):>10}"
        lines.append(
            f"{result['section']:<12} {result['status']:<11}{result['seconds']:>8.1f}  {counts}  {result['text'][:120]}"
        )
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
