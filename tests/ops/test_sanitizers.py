"""Every folder of C++ kernels under the address and undefined-behaviour sanitizers: its own tests, with every instruction set they try."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkvlm import native
from rwkvlm.config import env

TESTS = Path(__file__).resolve().parents[1]
FOLDERS = sorted({path.parent.name for path in native.SOURCE_DIR.glob("*/*.cpp")})
# the others: ops/test_NAME*.py
FILES = {"loss": "ops/test_cross_entropy.py", "rwkv7_step": "infer/test_step.py", "tokenizer": "data/test_native_tokenizer.py"}
ALSO_USED = {"rwkv7_step": ["fused", "wkv7"]}  # by the model with which it is compared
# -O1, or checks that are no calls, would compile wkv7 for minutes. A vector's indices are looked at too, and its memory behind
# what is in use.
FLAGS = (
    "-O0 -g1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all --param asan-instrumentation-with-call-threshold=0"
    " -D_GLIBCXX_ASSERTIONS -D_GLIBCXX_SANITIZE_VECTOR"
)
# Forms in plain PyTorch; what looks at torch's side of an operator, measures memory or takes long for what shorter tests do too.
LEFT_OUT = (
    "[torch] or [torch- or -torch] or -torch- or compile or opcheck or well_formed or never_whole or default_is_native"
    " or more_exponentials or every_code_point or automaton_is_the_scan or (longer_than_a_vector and -4)"
    " or (same_bits_on_every_run and dtype1)"
)
TESTED = "import sys, pytest; from rwkvlm import native; getattr(native, sys.argv[1])(sys.argv[2]); sys.exit(pytest.main(sys.argv[3:]))"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, str]:
    """Variables of a process that builds sanitized kernels, in one folder for all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "sanitized"
    return os.environ | {"RWKV_CXXFLAGS": FLAGS, "RWKV_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def loaded(built) -> dict[str, str]:
    """The same of one that loads them. The sanitizer's runtime needs the C++ one beside it, or finds no way to pass on what is thrown."""
    found = [
        subprocess.run([env.cxx(), f"-print-file-name={x}"], capture_output=True, text=True).stdout.strip()
        for x in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, found)):
        pytest.skip(f"{env.cxx()} has no libasan")
    return built | {"LD_PRELOAD": " ".join(map(os.path.realpath, found)), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_they_find_nothing(name: str, built: dict[str, str], loaded: dict[str, str]) -> None:
    # Not where the runtime is preloaded: it would slow the compiler down tenfold.
    subprocess.run(
        [sys.executable, "-c", f"from rwkvlm import native; [native.build(x) for x in {[name, *ALSO_USED.get(name, [])]}]"],
        env=built,
        check=True,
        timeout=600,
    )
    load = "load" if (native.SOURCE_DIR / name / "op.cpp").exists() else "library"
    options = ["-q", "-x", "-s", "-m", "not slow", "-k", f"not ({LEFT_OUT})", "-p", "no:cacheprovider"]
    files = map(str, sorted(TESTS.glob(FILES.get(name, f"ops/test_{name}*.py"))))
    done = subprocess.run(
        [sys.executable, "-c", TESTED, load, name, *options, *files], env=loaded, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    if skipped:
        pytest.skip(f"they find nothing in what was run, but not all was: {skipped}")


SOURCE = """
#include <stdlib.h>
#include "../common/isa.h"
#include "../common/simd.h"
#define NAMED(isa) JOIN(fault_, isa)
extern "C" __attribute__((visibility("default"))) int NAMED(ISA)(int fault) {
  if (isa::of_this_machine() < isa::ISA) return 77;
  float* x = static_cast<float*>(aligned_alloc(64, 128));
  store(x, splat(1.f));
  stream(x + 32 - W, load(x));
  if (fault == 1) store(x, load(x + 33 - W));
  if (fault == 2) store(x + 33 - W, load(x));
  if (fault == 3) stream(x + 32, load(x));
  if (fault == 4) stream(reinterpret_cast<bf16*>(x + 32), load(x));
  if (fault == 5) x[0] = 0x7ffffffb + fault;
  if (fault == 6) x[0] = int32_t(x[1] * 3e9f);
  return 0;
}
"""
PLANTED = "import sys; from pathlib import Path; from rwkvlm import native; native.SOURCE_DIR = Path(sys.argv[1]); "
SAID = ["", *["ERROR: AddressSanitizer"] * 4, "signed integer overflow", "outside the range of representable values"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", native.INSTRUCTION_SETS)
def test_they_see_what_is_planted(isa: str, built: dict[str, str], loaded: dict[str, str], tmp_path: Path) -> None:
    """In the vectors of simd.h, streamed ones included, whose stores GCC does not look at."""
    (tmp_path / "common").symlink_to(native.SOURCE_DIR / "common")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "cpu.cpp").write_text(SOURCE)
    subprocess.run([sys.executable, "-c", f"{PLANTED}native.build('planted')", str(tmp_path)], env=built, check=True, timeout=300)
    for fault, said in enumerate(SAID):
        program = f"{PLANTED}sys.exit(native.library('planted').fault_{isa}({fault}))"
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=loaded, capture_output=True, text=True, timeout=100)
        if done.returncode == 77:
            pytest.skip(f"this machine has no {isa}")
        assert said in done.stderr and (done.returncode == 0) == (fault == 0), (fault, done.stderr[-2000:])
