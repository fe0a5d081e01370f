"""The native single-token step against the model itself, which is its slow reference."""

import copy
import functools
import mmap

import pytest
import torch

from rwkvlm.config import ModelConfig
from rwkvlm.infer import Engine
from rwkvlm.models import build, init_weights
from rwkvlm.ops import backend, rwkv7_step

TOKENS = torch.randint(300, (12,), generator=torch.Generator().manual_seed(1)).tolist()
SIZES = {
    "N16": dict(n_layer=2, n_embd=48, head_size=16),
    "N32": dict(n_layer=3, n_embd=64, head_size=32),
    "N64": dict(n_layer=2, n_embd=192, head_size=64),
    "N128": dict(n_layer=2, n_embd=128, head_size=128),
    "one block": dict(n_layer=1, n_embd=64, head_size=64),
    "more columns than a pass takes": dict(n_layer=2, n_embd=48, head_size=16, dim_ffn=4133),
    "odd ranks": dict(n_layer=2, n_embd=64, head_size=32, rank_w=5, rank_a=17, rank_v=20, rank_g=33, dim_ffn=101),
}


@functools.cache
def made(size, in_file, seed):
    """A model whose numbers all fit `in_file`, away from its initial values, where the output would be trivial."""
    model = build(ModelConfig(vocab_size=300, **SIZES[size]))
    init_weights(model, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
            p.copy_(p.to(in_file))
        for name in ("v0", "v1", "v2"):
            getattr(model.blocks[0].att, name).fill_(torch.nan)  # unused: a file may lack them
    return model


def model_of(size, dtype=torch.float32, in_file=torch.bfloat16, seed=2):
    """A copy of its own, as tests change it; to make one anew for every number that is to be NaN took longer than what is tested."""
    return copy.deepcopy(made(size, in_file, seed)).to(dtype)


def engine_of(model):
    engine = Engine(model, tokenizer=None)
    assert engine._step is not None, rwkv7_step.why_not()
    return engine


def by_model(model, state=None, tokens=TOKENS):
    """Logits after each token and the last state, by the model's own path."""
    logits = []
    with torch.inference_mode():
        for token in tokens:
            x, state = model(torch.tensor([[token]]), state, return_state=True)
            logits.append(x[0])
    return torch.cat(logits), state


def by_step(engine, state, tokens=TOKENS):
    logits = []
    for token in tokens:
        x, state = engine.read([token], state)
        logits.append(x)
    return torch.cat(logits), state


@functools.cache
def reference(size, in_file):
    model = model_of(size, in_file=in_file)
    return model, *by_model(model)


def close(got, want, tolerance):
    assert got.shape == want.shape and got.dtype == want.dtype
    return (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.fixture(params=[0, 1, 2], ids=["plain", "avx2", "avx512"])
def isa(request):
    assert not rwkv7_step.why_not()
    if torch.ops.rwkvlm.rwkv7_step_limit_isa(request.param) != request.param:
        pytest.skip("not on this processor")
    yield
    torch.ops.rwkvlm.rwkv7_step_limit_isa(2)


@pytest.mark.parametrize("in_file", [torch.bfloat16, torch.float32], ids=["bf16 file", "fp32 file"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_model(size, in_file, isa):
    model, want, want_state = reference(size, in_file)
    engine = engine_of(model)
    assert engine._step.head.dtype == in_file, "matrices are kept as narrow as they are, and no narrower"
    got, state = by_step(engine, model.init_state(1))
    assert want.std() > 0.1, "a trivial output would prove nothing"
    assert close(got, want, 1e-5)
    for block, want_block in zip(state, want_state):
        assert type(block) is type(want_block)
        assert all(close(x, y, 1e-5) for x, y in zip(block, want_block))


def test_keys_of_length_zero():
    model = model_of("N32")
    with torch.no_grad():
        model.blocks[1].att.k_k.zero_()
    want, _ = by_model(model)
    assert want.isfinite().all() and close(by_step(engine_of(model), model.init_state(1))[0], want, 1e-5)


def test_nan_is_not_hidden(isa):
    """One number of one parameter: the logits that it makes NaN are those of the model."""
    for name in [name for name, _ in model_of("N16").named_parameters() if name.startswith("blocks.1.")]:
        model = model_of("N16")
        with torch.no_grad():
            model.get_parameter(name).flatten()[5] = torch.nan
        want, want_state = by_model(model, tokens=TOKENS[:2])
        got, state = by_step(engine_of(model), model.init_state(1), TOKENS[:2])
        assert want.isnan().any() and torch.equal(got.isnan(), want.isnan()), name
        assert all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(state[1], want_state[1])), name


def test_a_bf16_model_is_stepped_in_float32():
    """Nearer to the exact logits of its weights than its own bf16 arithmetic, with states that both paths read."""
    model, exact = model_of("N64", torch.bfloat16), model_of("N64").double()
    want, _ = by_model(exact)
    own, _ = by_model(model)
    got, state = by_step(engine_of(model), model.init_state(1))
    assert state[0].att_x.dtype == torch.bfloat16 and state[0].wkv.dtype == torch.float32
    assert (got - want).norm() < (own - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_matrices_that_stay_as_they_are_are_in_memory_once(dtype):
    model = model_of("N32", dtype, in_file=dtype)
    before, _ = by_model(model)
    engine = engine_of(model)
    with torch.inference_mode():
        engine.read(TOKENS, None)
    assert engine._step.head.data_ptr() == model.head.weight.data_ptr()
    assert engine._step.matrices[-1].data_ptr() == model.blocks[-1].ffn.value.weight.data_ptr()
    assert torch.equal(by_model(model)[0], before)
    model.head.weight.sum().backward()  # still a parameter


def test_prompt_step_and_prompt_share_their_state():
    model = model_of("N32")
    engine = engine_of(model)
    want, _ = by_model(model)
    _, state = engine.read(TOKENS[:6])
    kept = [[x.clone() for x in block] for block in state]
    _, after = engine.read(TOKENS[6:7], state)
    assert all(torch.equal(x, y) for block, copy in zip(state, kept) for x, y in zip(block, copy)), "a state is not changed by reading on"
    logits, _ = engine.read(TOKENS[7:], after)
    assert close(logits, want[-1:], 1e-5)


def test_same_bits_for_any_number_of_threads():
    engine = engine_of(model_of("N64"))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(by_step(engine, engine.model.init_state(1))[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_kernel_asked_for_decides(monkeypatch):
    assert Engine(model_of("N32", torch.float64), tokenizer=None)._step is None, "it computes in float32"
    monkeypatch.setattr(backend, "_requested", "torch")
    assert Engine(model_of("N32"), tokenizer=None)._step is None


def test_what_does_not_fit_the_step_is_refused():
    """Its operator looks at everything that it is given, and reads nothing beside it."""
    step = engine_of(model_of("N32"))._step
    C, L, V = 64, 3, 300
    state = [[torch.zeros(1, C)] * L, [torch.zeros(1, 2, 32, 32)] * L, [torch.zeros(1, C)] * L]

    def call(x=torch.zeros(C), state=state, head_size=32, vectors=step.vectors, norms=step.norms, head=step.head, **changed):
        matrices = [changed.get(f"m{i}", m) for i, m in enumerate(step.matrices)]
        return torch.ops.rwkvlm.rwkv7_step(x, matrices, vectors, norms, head, *state, head_size)

    assert call()[0].shape == (V,)
    m = step.matrices
    wrong = [
        dict(x=torch.zeros(C, dtype=torch.float64)),
        dict(norms=step.norms[:3]),
        dict(vectors=[v[:-C] for v in step.vectors]),
        dict(vectors=step.vectors[:2]),
        dict(head_size=24),
        dict(head_size=0),
        dict(head=step.head.half(), **{f"m{i}": t.half() for i, t in enumerate(m)}),
        dict(head=step.head.float()),
        dict(head=step.head[:, : C // 2].contiguous()),
        dict(m0=m[0].t()),
        dict(m0=m[0][:-1]),
        dict(m1=m[1].flatten()),
        dict(m2=m[2].float()),
        dict(m7=m[7][:, 1:].contiguous()),
        dict(m13=m[13][:-1]),
        *(dict(state=[lists[:2] if i == j else lists for i, lists in enumerate(state)]) for j in range(3)),
        *(dict(state=[[t.flatten()[1:] for t in lists] if i == j else lists for i, lists in enumerate(state)]) for j in range(3)),
        *(dict(state=[state[0], [t.transpose(2, 3)[..., :n] for t in state[1]], state[2]]) for n in (16, 32)),
    ]
    for change in wrong:
        with pytest.raises(RuntimeError, match="rwkv7_step: "):
            pytest.fail(f"{ {name: getattr(value, 'shape', value) for name, value in change.items()} } was taken: {call(**change)[0][:1]}")


def test_wrong_states_are_refused():
    engine = engine_of(model_of("N32"))
    state = engine.model.init_state(2)
    with pytest.raises(RuntimeError, match="rwkv7_step: expected 64 contiguous float32"):
        engine.read([1], state)
    with pytest.raises(RuntimeError, match="do not fit 3 blocks"):
        engine.read([1], engine.model.init_state(1)[:2])


def test_a_kernel_without_large_pages_has_the_same_copies(monkeypatch):
    class Memory(mmap.mmap):
        def madvise(self, option):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(rwkv7_step.mmap, "mmap", Memory)
    matrices = [torch.randn(3, 5), torch.randn(4, 4)]
    assert all(map(torch.equal, rwkv7_step.on_large_pages(matrices, torch.float32), matrices))
