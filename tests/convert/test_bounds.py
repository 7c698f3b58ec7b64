"""What a conversion costs in memory, what a kill leaves, and what a bad disk does."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from t2r.convert import convert
from t2r.convert.directio import VerificationError
from t2r.model.mixers import parse_options
from t2r.publish import verify_manifest

GSA = parse_options({"name": "gsa", "slots": 8})

MEASURE = """
import json, re, sys
from pathlib import Path
from t2r.convert import convert
from t2r.model.mixers import parse_options
tiny, broad, out = sys.argv[1:]
options = parse_options({"name": "gsa"})
peaks = []
for source, name, dtype in ((tiny, "0", None), (broad, "1", "bfloat16"), (broad, "2", "float32")):
    convert(source, out + name, mixers=options, dtype=dtype)
    # not ru_maxrss, which starts at the parent's
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
print(json.dumps(peaks))
"""


def test_memory_is_a_few_blocks_whatever_the_size_of_the_tensors(hosts, tmp_path):
    """Bound of the project: two of the largest tensors + 300 MB above the interpreter. Held here: less than one."""
    config = MistralConfig(vocab_size=98304, hidden_size=1024, intermediate_size=256, num_hidden_layers=1,
                           num_attention_heads=8, num_key_value_heads=2, dtype="bfloat16")  # fmt: skip
    broad = tmp_path / "broad"
    config.save_pretrained(broad)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, broad / "model.safetensors", {"format": "pt"})
    largest = max(x.nbytes for x in tensors.values())
    assert largest > 200e6

    arguments = [sys.executable, "-c", MEASURE, hosts("mistral"), broad, tmp_path / "student"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    interpreter, copied, cast = json.loads(done.stdout.splitlines()[-1])
    print(f"copied {(copied - interpreter) / 1e6:.0f} MB, cast {(cast - interpreter) / 1e6:.0f} MB")
    assert copied - interpreter < largest, f"{(copied - interpreter) / 1e6:.0f} MB to copy"
    assert cast - interpreter < largest, f"{(cast - interpreter) / 1e6:.0f} MB to cast"


def convert_and_die(source: Path, destination: Path, event_number: int) -> int:
    """Convert in a forked process that is killed just before its n-th file-system event; return its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.rmdir", "os.mkdir") and str(destination.parent) in str(arguments[0]):
                seen += 1
                if seen > event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        convert(source, destination, mixers=GSA, max_shard_size="100KB")
    except BaseException:
        os._exit(1)
    os._exit(0)


def loads(folder: Path) -> bool:
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return True


def test_a_kill_at_any_moment_leaves_nothing_that_loads_and_the_next_run_works(hosts, tmp_path):
    source, student = hosts("mistral"), tmp_path / "out" / "student"
    for event_number in range(1000):
        status = convert_and_die(source, student, event_number)
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
        assert not any(loads(folder) for folder in folders if folder != student), event_number
        assert not loads(student) or verify_manifest(student) == [], event_number
        if event_number % 5 == 0 and not loads(student):
            convert(source, student, mixers=GSA)
            assert verify_manifest(student) == []
            assert [path.name for path in student.parent.iterdir()] == ["student"]
            for path in student.iterdir():
                path.unlink()
            student.rmdir()
        if loads(student):
            break
    assert event_number > 30, "the kills did not reach through the conversion"
    assert verify_manifest(student) == []


def test_a_kill_between_the_last_two_renames(hosts, t2r, tmp_path):
    """The folder has its name but config.json does not: it does not load, and the next run replaces it unasked."""
    assert t2r("convert", hosts("mistral"), tmp_path / "student").code == 0
    (tmp_path / "student" / "config.json").rename(tmp_path / "student" / ".config.json.pending")
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(tmp_path / "student", trust_remote_code=False)
    assert t2r("convert", hosts("mistral"), tmp_path / "student").code == 0
    assert verify_manifest(tmp_path / "student") == []


def test_a_disk_that_changes_a_byte_is_found_out(hosts, tmp_path, monkeypatch):
    write = os.pwrite

    def flip(descriptor: int, data: memoryview, offset: int) -> int:
        wrong = bytearray(data)
        wrong[-1] ^= 1
        return write(descriptor, bytes(data[:-4096]) + bytes(wrong[-4096:]), offset)

    monkeypatch.setattr(os, "pwrite", flip)
    monkeypatch.setattr(os, "open", without_direct(os.open))  # whose addresses must be aligned
    with pytest.raises(VerificationError, match="read back otherwise"):
        convert(hosts("mistral"), tmp_path / "student", mixers=GSA)
    assert list(tmp_path.iterdir()) == []


def test_file_systems_without_direct_access(hosts, tmp_path, monkeypatch):
    convert(hosts("mistral"), tmp_path / "direct", mixers=GSA)
    monkeypatch.setattr(os, "open", without_direct(os.open))
    convert(hosts("mistral"), tmp_path / "cached", mixers=GSA)
    for path in (tmp_path / "direct").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cached" / path.name).read_bytes()


def without_direct(open_file: Callable[..., int]) -> Callable[..., int]:
    """os.open of a file system that makes the file and then refuses O_DIRECT."""

    def refuse(path: Path, flags: int, *arguments: int, **options: object) -> int:
        descriptor = open_file(path, flags & ~os.O_DIRECT, *arguments, **options)
        if flags & os.O_DIRECT:
            os.close(descriptor)
            raise OSError(errno.EINVAL, "no direct access")
        return descriptor

    return refuse
