"""The experts' grouped GEMM, interpreted, and the XLA reference: both against a dense product in float64."""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jeagle import moe
from jeagle.moe import Experts, resolve, run_experts
from jeagle.sharding import Layout, Rules, make_mesh, use
from jeagle.weights import quantize
from pallas_kernels import grouped_mlp_pallas
from pallas_kernels import plan as kernel_plan
from pallas_kernels.grouped_mlp_pallas import blocks, grouped_mlp, num_blocks, tiles

IMPLEMENTATIONS = {"xla": partial(run_experts, all_here=False), "pallas": partial(grouped_mlp, interpret=True)}
BF16, F32 = jnp.bfloat16, jnp.float32


class Shape(NamedTuple):
    m: int
    E: int
    D: int
    F: int
    dtype: type = F32


SHAPES = {
    "a row": Shape(1, 4, 128, 64),  # whose first launch is split
    "a row of narrow experts": Shape(1, 3, 48, 16, BF16),
    "few rows, bf16": Shape(5, 8, 64, 96, BF16),
    "blocks": Shape(40, 5, 32, 32),
    "blocks, bf16": Shape(33, 3, 64, 32, BF16),
    "one expert": Shape(40, 1, 16, 32),
}


def choices(shape: Shape) -> dict[str, np.ndarray]:
    """Which expert each row chose, in several manners."""
    m, E = shape.m, shape.E
    rng = np.random.default_rng(m)
    return {
        "the first": np.zeros(m),
        "the last": np.full(m, E - 1),
        "each its own": np.arange(m) % E,
        "two, by turns": np.where(np.arange(m) % 2, 0, E - 1),
        "any": rng.integers(0, E, m),
        "some elsewhere": rng.integers(-2, E + 2, m),
        "all elsewhere": rng.choice([-1, E], m),
    }


@cache
def draw(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x, gate_up, down)."""
    m, E, D, F, dtype = shape
    rng = np.random.default_rng(0)
    sizes = (m, D), (E, D, 2, F), (E, F, D)
    return tuple(jnp.asarray(rng.standard_normal(s) * (4 / s[1]) ** 0.5, dtype) for s in sizes)


def dense(x, expert_m, gate_up, down) -> np.ndarray:
    """Float64. The hidden rows are not rounded as they are in bfloat16."""
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate_up, down))
    y = np.zeros_like(x)
    for i, e in enumerate(expert_m):
        if 0 <= e < len(down):
            gate, up = np.einsum("d,dcf->cf", x[i], gate_up[e])
            y[i] = gate / (1 + np.exp(-gate)) * up @ down[e]
    return y


@cache
def compiled(name: str, shape: Shape):
    expert_m = jnp.zeros(shape.m, jnp.int32)
    x, gate_up, down = draw(shape)
    return jax.jit(IMPLEMENTATIONS[name]).lower(x, expert_m, gate_up, down).compile()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_a_dense_product(implementation, name):
    """Experts that nobody chose are NaN: their weights are not read, not even to be multiplied by zero."""
    shape = SHAPES[name]
    run, (x, gate_up, down) = compiled(implementation, shape), draw(shape)
    tolerance = 2e-2 if shape.dtype == BF16 else 2e-5
    for choice, expert_m in choices(shape).items():
        idle = jnp.asarray(~np.isin(np.arange(shape.E), expert_m))
        poisoned = [jnp.where(idle.reshape(-1, *[1] * (w.ndim - 1)), jnp.nan, w) for w in (gate_up, down)]
        y = run(x, jnp.asarray(expert_m, jnp.int32), *poisoned)
        assert y.dtype == shape.dtype and y.shape == x.shape
        expected = dense(x, expert_m.astype(int), gate_up, down)
        np.testing.assert_allclose(
            np.asarray(y, np.float64), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(), err_msg=choice
        )


def test_the_battery_meets_every_branch():
    """Split and whole first launches, and more blocks than experts."""
    first = {name: tiles(**shape._asdict())[0] for name, shape in SHAPES.items()}
    assert first["a row"].splits > 1 and first["a row of narrow experts"].splits == 1
    for name in ("blocks", "blocks, bf16", "one expert"):
        assert SHAPES[name].m > first[name].rows


def test_results_do_not_depend_on_the_other_rows():
    """To the bit: a row's sums are taken in the same order wherever it lies in its block. (One row alone may split.)"""
    shape = SHAPES["blocks"]
    run, (x, gate_up, down) = compiled("pallas", shape), draw(shape)
    alone = run(x, jnp.where(jnp.arange(shape.m) == 7, 2, -1), gate_up, down)[7]
    for expert_m in (jnp.full(shape.m, 2), jnp.arange(shape.m).at[7].set(2) % shape.E):
        np.testing.assert_array_equal(run(x, expert_m.astype(jnp.int32), gate_up, down)[7], alone)


@pytest.mark.parametrize(("m", "E", "rows"), [(1, 1, 16), (4, 3, 2), (9, 4, 2), (7, 16, 16), (40, 2, 16)])
def test_blocks_hold_every_row_once(m, E, rows):
    rng = np.random.default_rng(m)
    table = jax.jit(blocks, static_argnums=(1, 2))
    most = 0
    for expert_m in [rng.integers(0, rng.integers(1, E + 1), m) for _ in range(30)] + [np.arange(m) % (E + 1)]:
        row_bR = np.asarray(table(jnp.asarray(expert_m, jnp.int32), E, rows))
        held = [row[row < m] for row in row_bR]
        used = [rows_of for rows_of in held if len(rows_of)]
        assert sorted(np.concatenate(used)) == list(range(m))
        assert all(len(set(expert_m[rows_of])) == 1 for rows_of in used)
        assert all(
            (row[: len(rows_of)] == rows_of).all() for row, rows_of in zip(row_bR, held)
        )  # the first is the leader
        expected = sum(-(-np.bincount(expert_m, minlength=E + 1) // rows))
        assert len(used) == expected and all(len(rows_of) for rows_of in held[:expected])
        most = max(most, expected)
    assert most <= num_blocks(m, E, rows)


def test_blocks_of_the_docstring():
    table = blocks(jnp.array([2, 0, 2, 2]), 3, 2)
    np.testing.assert_array_equal(table, [[1, 4], [0, 2], [3, 4], [4, 4]])


@pytest.mark.parametrize(("E", "F"), [(16, 1024), (128, 1024), (16, 8192)])
@pytest.mark.parametrize("m", [1, 2, 4, 8, 64, 512, 4096])
def test_tiles_of_llama4(m, E, F):
    """Tiles divide their axes, and an H100's multiprocessors have work wherever rows are many or experts are whole."""
    D = 5120
    for launch, contracted, width in zip(tiles(m=m, E=E, D=D, F=F, dtype=BF16), (D, F), (F, D)):
        assert contracted % (launch.depth * launch.splits) == 0 and width % launch.columns == 0
        assert launch.rows >= 16 and launch.depth >= 16 and launch.columns >= 16
        assert launch.splits == 1 or m == 1
        programs = min(m, E) * (width // launch.columns) * launch.splits
        assert programs >= (64 if F == 1024 and m < 4 else 80)
    assert num_blocks(m, E, tiles(m=m, E=E, D=D, F=F, dtype=BF16)[0].rows) <= min(m, E + 1) + -(-m // 16)


def test_widths_it_cannot_serve_are_refused():
    x, gate_up, down = draw(Shape(2, 2, 24, 32))
    with pytest.raises(NotImplementedError, match="widths 24 and 32 are not both multiples of 16"):
        grouped_mlp(x, jnp.zeros(2, jnp.int32), gate_up, down)


@pytest.mark.parametrize("rule", ["mlp", "experts"])
def test_experts_split_over_devices(rule):
    """Each device with parts of all experts, or with whole ones, where rows that chose others' experts get zeros."""
    experts = Experts(32, 64, 4, 1, dtype=F32, rngs=nnx.Rngs(0))
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 32)), F32)
    expected = jax.jit(lambda x: experts(x))(x_BTD)
    assert np.abs(expected).max() > 1e-4
    experts.implementation = "pallas"
    with use(Layout(make_mesh(1, 2), Rules.choose(experts=rule))):
        np.testing.assert_allclose(jax.jit(lambda x: experts(x))(x_BTD), expected, rtol=2e-5, atol=1e-8)


def test_names_are_resolved_and_never_replaced(monkeypatch):
    assert (resolve("auto", "cpu"), resolve("auto", "tpu"), resolve("auto", "gpu")) == ("xla", "xla", "pallas")
    assert [resolve(name) for name in moe.IMPLEMENTATIONS] == ["xla", "pallas"]
    # What the kernels would refuse on a GPU is XLA's: FP8 experts of 2 to 4 GiB (Maverick's on four GPUs), odd widths.
    for shape, dtype, chosen in (
        ((128, 5120, 2, 1024), "float8_e4m3fn", "pallas"),
        ((128, 5120, 2, 2048), "float8_e4m3fn", "xla"),
        ((128, 5120, 2, 2048), "bfloat16", "pallas"),
        ((16, 40, 2, 64), "bfloat16", "xla"),
    ):
        assert resolve("auto", "gpu", jax.ShapeDtypeStruct(shape, dtype)) == chosen
    monkeypatch.setattr(grouped_mlp_pallas, "compute_capability", lambda: 8.0)
    assert resolve("auto", "gpu", jax.ShapeDtypeStruct((128, 5120, 2, 1024), "float8_e4m3fn")) == "xla"
    monkeypatch.setattr(kernel_plan, "compute_capability", lambda: 8.9)
    assert max(t.rows for t in tiles(m=4096, E=16, D=5120, F=1024, dtype=BF16)) == 64
    experts = Experts(32, 24, 4, 1, implementation="pallas", dtype=F32, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="widths 32 and 24"):
        experts(jnp.zeros((1, 1, 32)))
    experts.implementation = "triton"
    with pytest.raises(ValueError, match=r"'triton' is unknown; choose one of \['auto', 'xla', 'pallas'\]"):
        experts(jnp.zeros((1, 1, 32)))


def test_a_row_of_another_device_reads_no_scale():
    weights = jnp.ones((2, 16, 2, 16), jnp.float8_e4m3fn), jnp.ones((2, 16, 16), jnp.float8_e4m3fn)
    scales = jnp.full((2, 2, 16), jnp.nan), jnp.full((2, 16), jnp.nan)
    for compute in IMPLEMENTATIONS.values():
        assert not np.any(compute(jnp.ones((1, 16)), jnp.array([-1], jnp.int32), *weights, *scales))


@pytest.mark.parametrize("m", [1, 5])  # one row: the first launch in parts
def test_fp8_weights(m):
    """Numbers and scales as the XLA implementation reads them, which is the reference of dequantised weights too."""
    rng = np.random.default_rng(m)
    E, D, F = 3, 64, 32
    x_mD = jnp.asarray(rng.standard_normal((m, D)), jnp.float32)
    expert_m = jnp.asarray(rng.integers(0, E, m), jnp.int32)
    gate_up, gate_up_scale = quantize(rng.standard_normal((E, D, 2, F)).astype(np.float32), (1,))
    down, down_scale = quantize(rng.standard_normal((E, F, D)).astype(np.float32), (1,))
    operands = [jnp.asarray(x) for x in (gate_up, down, gate_up_scale, down_scale)]
    wanted = run_experts(x_mD, expert_m, *operands)
    np.testing.assert_allclose(grouped_mlp(x_mD, expert_m, *operands), wanted, rtol=2e-5, atol=2e-4)
    wide = (gate_up.astype(np.float32) * gate_up_scale[:, None], down.astype(np.float32) * down_scale[:, None])
    np.testing.assert_allclose(run_experts(x_mD, expert_m, *wide), wanted, rtol=2e-5, atol=2e-4)
