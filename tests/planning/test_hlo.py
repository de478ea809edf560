"""Collectives counted from HLO: what stands in a loop counts once for every trip."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorax_gen.planning import hlo

LAYERS, INNER, WIDTH = 5, 3, 16


@pytest.fixture(scope="module")
def compiled():
    """A program whose collectives are written out, for 8 devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def layer(h, w):
        h = h @ jax.lax.all_gather(w, "x", tiled=True)

        def step(h, _):
            return jnp.sin(jax.lax.psum(h, "x")), None

        return jax.lax.scan(step, h, length=INNER)[0], None

    def program(h, weights):
        h, _ = jax.lax.scan(layer, h, weights)
        h = jax.lax.ppermute(h, "x", [(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.psum_scatter(h, "x", scatter_dimension=1, tiled=True)

    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(P("x"), P(None, "x")), out_specs=P("x"), check_vma=False
    )
    shapes = [(16, WIDTH), (LAYERS, WIDTH, WIDTH)]
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


def test_each_trip_of_a_scan_counts(compiled):
    found = hlo.collectives(compiled.as_text())
    assert {kind: each.count for kind, each in found.items()} == {
        "all-gather": LAYERS,
        "all-reduce": LAYERS * INNER,
        "collective-permute": 1,
        "reduce-scatter": 1,
    }


def test_bytes_are_those_that_a_ring_sends(compiled):
    found = hlo.collectives(compiled.as_text())
    rows = 2 * WIDTH * 4  # of a device
    assert found["all-gather"].bytes == LAYERS * WIDTH * WIDTH * 4 * 7 // 8
    assert found["all-reduce"].bytes == LAYERS * INNER * 2 * rows * 7 // 8
    assert found["collective-permute"].bytes == rows
    assert found["reduce-scatter"].bytes == rows * 7 // 8


def test_a_program_on_one_device_sends_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile()
    assert hlo.collectives(compiled.as_text()) == {}


def test_loops_without_a_known_count_are_counted_by_their_counter():
    """As TPU programs have them: from 2 to 8 in steps of 2; one collective in two fusions."""
    text = textwrap.dedent("""\
        HloModule jit_f, is_scheduled=true

        %start.1 (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
          %p = bf16[4,8]{1,0} parameter(0)
          %all-gather.1 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
          ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
        }

        %done.1 (p.1: bf16[4,8]) -> bf16[16,8] {
          %p.1 = bf16[4,8]{1,0} parameter(0)
          %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
          ROOT %custom-call.2 = bf16[16,8]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
        }

        %body (carry: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
          %two = u32[]{:T(128)} constant(2)
          %carry = (bf16[4,8]{1,0:T(8,128)(2,1)}, /*index=1*/u32[]{:T(128)}) parameter(0)
          %x = bf16[4,8]{1,0} get-tuple-element(%carry), index=0
          %i = u32[]{:T(128)} get-tuple-element(%carry), index=1
          %fusion.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%x), kind=kCustom, calls=%start.1
          %fusion.2 = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%done.1
          %permute = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
          %arrived = bf16[4,8]{1,0} collective-permute-done(%permute)
          %next = u32[]{:T(128)} add(%i, %two)
          ROOT %tuple.1 = (bf16[4,8]{1,0}, u32[]{:T(128)}) tuple(%arrived, %next)
        }

        %condition (carry.1: (bf16[4,8], u32[])) -> pred[] {
          %eight = u32[]{:T(128)} constant(8)
          %carry.1 = (bf16[4,8]{1,0}, u32[]{:T(128)}) parameter(0)
          %i.1 = u32[]{:T(128)} get-tuple-element(%carry.1), index=1
          ROOT %less = pred[]{:T(512)} compare(%i.1, %eight), direction=LT
        }

        ENTRY %main (x.1: bf16[4,8]) -> bf16[4,8] {
          %from = u32[]{:T(128)} constant(2)
          %x.1 = bf16[4,8]{1,0} parameter(0)
          %tuple.2 = (bf16[4,8]{1,0}, u32[]{:T(128)}) tuple(%x.1, %from)
          %while.1 = (bf16[4,8]{1,0}, u32[]{:T(128)}) while(%tuple.2), condition=%condition, body=%body
          ROOT %out = bf16[4,8]{1,0} get-tuple-element(%while.1), index=0
        }
    """)  # noqa: E501
    found = hlo.collectives(text)
    assert found["all-gather"] == hlo.Traffic(count=3, bytes=3 * 16 * 8 * 2 * 3 // 4)
    assert found["collective-permute"] == hlo.Traffic(count=3, bytes=3 * 4 * 8 * 2)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b'=2,'c'=3] {'a','c'}", 12),
        ("{}", 1),
    ],
)
def test_replica_groups_in_every_notation(groups, size):
    assert hlo.group_size(f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}") == size
