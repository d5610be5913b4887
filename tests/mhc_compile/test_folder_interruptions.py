"""A conversion that is killed, out of space or beside another one; and what memory it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from folders import LLAMA, assert_same_tree
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from mhc_compile import convert_folder

# --- interruptions -------------------------------------------------------------------------------------------------

DRIVER = """
import json, os, resource, signal, sys
import torch
torch.set_num_threads(1)
from mhc_compile import MHCError, convert_folder

source, target, warm, *points = sys.argv[1:]
convert_folder(source, warm)  # the children inherit what this imports
for point in points:
    child = os.fork()
    if child == 0:
        if point.isdigit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(point), int(point)))
        try:
            convert_folder(source, target, progress=lambda done, total, what:
                what.startswith(point) and os.kill(os.getpid(), signal.SIGKILL))
        except MHCError as error:
            os._exit(int(error.code.removeprefix("MHC")) - 400)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps([point, os.waitstatus_to_exitcode(status), sorted(os.listdir(os.path.dirname(target)))]))
"""


def test_killed_or_out_of_space_leaves_nothing_finished_and_a_rerun_finishes(original: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    points = ["finding", "model-00003", "finishing", "20000", "40000"]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, original, tmp_path / "here" / "out", tmp_path / "warm", *points],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = {point: (code, files) for point, code, files in map(json.loads, run.stdout.splitlines())}
    assert told == {
        "finding": (-9, []),
        "model-00003": (-9, [".out.mhc-partial"]),
        "finishing": (-9, [".out.mhc-partial"]),
        # A limit on the size of a file is how the system refuses to write on: the weights, then the streams.
        "20000": (13, []),
        "40000": (13, []),
    }
    convert_folder(original, tmp_path / "here" / "out")
    convert_folder(tmp_path / "here" / "out", tmp_path / "back", to="residual")
    assert_same_tree(original, tmp_path / "back")


def test_leftovers_of_a_killed_process_do_not_mix_in(original: Path, tmp_path: Path) -> None:
    stale = tmp_path / ".out.mhc-partial"
    (stale / "folder").mkdir(parents=True)
    (stale / "folder" / "old").write_text("x")
    (stale / "mhc.json").write_text("x")
    (stale / "link").symlink_to(original)
    convert_folder(original, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "folder").exists()
    assert not (tmp_path / "out" / "link").exists()


MEMORY = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from mhc_compile import convert_folder

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
tiny, large, out = sys.argv[1:]
convert_folder(tiny, out + "/tiny")
before = peak()
convert_folder(large, out + "/large")
print(json.dumps([before, peak()]))
"""


def test_memory_is_that_of_one_shard(original: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**LLAMA | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12})
    with torch.device("meta"):
        large = LlamaForCausalLM(config)
    large.to_empty(device="cpu")
    for p in large.parameters():
        torch.nn.init.constant_(p, 0.5)
    large.save_pretrained(tmp_path / "large", max_shard_size="25MB")
    sizes = [p.stat().st_size for p in (tmp_path / "large").glob("*.safetensors")]
    assert sum(sizes) > 180e6
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, original, tmp_path / "large", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(run.stdout)
    assert after - before < 1.5 * max(sizes) + 20e6
