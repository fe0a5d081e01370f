"""A kernel folder of a test's own."""

import pytest

from rwkvlm import native


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A kernel folder of our own: op.cpp says how many of the builds of cpu.cpp are linked with it."""
    monkeypatch.setenv("RWKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCE_DIR", tmp_path / "cuda")
    folder = tmp_path / "cuda" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "cuda" / "common").mkdir()
    isas = list(native.INSTRUCTION_SETS)
    declared = "".join(f"int answer_{isa}();" for isa in isas)
    summed = " + ".join(f"answer_{isa}()" for isa in isas)
    (folder / "cpu.cpp").write_text("#define JOIN(a, b) a##b\n#define NAME(isa) JOIN(answer_, isa)\nint NAME(ISA)() { return 1; }\n")
    (folder / "op.cpp").write_text(f'{declared}\nextern "C" __attribute__((visibility("default"))) int answer() {{ return {summed}; }}\n')
    return folder
